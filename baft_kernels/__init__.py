"""baft_kernels: basis-level representation fine-tuning as a torch operator.

    out = h + R^T (w * (A h + b - R h)),   w = sigmoid(G h + c)

It imports torch and nothing else; the editing pipeline is the package ``baft``.
"""

from baft_kernels.functional import baft, baft_, grouped_baft
from baft_kernels.modules import BaftIntervention, GroupedBaftIntervention
from baft_kernels.packing import repack
from baft_kernels.reference import BaftOutput
from baft_kernels.stiefel import (
    orthonormal_basis,
    orthonormality_error,
    project_to_tangent,
    retract_,
    retract_after_step,
    retract_all_,
    retract_near_,
)

__version__ = "0.1.0"

__all__ = [
    "BaftIntervention",
    "BaftOutput",
    "GroupedBaftIntervention",
    "__version__",
    "baft",
    "baft_",
    "grouped_baft",
    "orthonormal_basis",
    "orthonormality_error",
    "project_to_tangent",
    "repack",
    "retract_",
    "retract_after_step",
    "retract_all_",
    "retract_near_",
]
