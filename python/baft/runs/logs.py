"""placeholder: C writes this"""

from typing import Any

MetricsLog = Any


def open_log(*a: Any) -> Any: ...
