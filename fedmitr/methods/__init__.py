"""All methods: functions from uploads to an `Outcome`, each registered with a `Method` record.

All share one signature, `method(uploads, settings, store) -> Outcome`. A method gets uploads only, never a
data set. Exceptions: `central` and `central_ridge` get one upload made of all data; methods of several
exchanges get clients (`fusefl.Client`, `_statistics.Client`); `real_images`, a reference, gets images
as well. The reported accuracy is the mean over the outcome's models: one, or one per client for `local`.

To add a method, write a file with its function and its record, `METHOD`, and add a line to `SHIPPED` below;
in a notebook, call `register` with a record.
"""

from importlib import import_module

from ._checks import check_methods
from ._method import (
    FAMILIES,
    METHODS,
    Method,
    Outcome,
    Range,
    Search,
    Work,
    add,
    described,
    dotted,
    find,
    in_order,
    register,
)
from ._student import Student

# The comparison, in the order of its tables: the name of a method is that of its file.
SHIPPED = (
    "fedavg",
    "ncm",
    "ridge",
    "ridge_plus",
    "lda",
    "fishermix",
    "fedavg_ridge",
    "stacking",
    "fedmitr",
    "fedmitr_plus",
    "fdafl",
    "fadi",
    "dense",
    "co_boosting",
    "fedftg",
    "fusefl",
    "ensemble",
    "calibrated_ensemble",
    "ensemble_statistics",
    "local",
    "textures",
    "real_images",
    "central",
    "central_ridge",
)
add(*(import_module(f".{name}", __name__).METHOD for name in SHIPPED))

__all__ = [
    "FAMILIES",
    "METHODS",
    "Method",
    "Outcome",
    "Range",
    "Search",
    "Student",
    "Work",
    "check_methods",
    "described",
    "dotted",
    "find",
    "in_order",
    "register",
]
