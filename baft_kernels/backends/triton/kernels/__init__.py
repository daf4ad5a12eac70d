"""The kernels. These modules import triton; nothing outside this folder does."""
