"""A protocol of two grounds and a panel, as a study of seconds has it."""

from helpers import SMALL_SETTINGS

METHODS = ["ridge", "ridge_plus", "ncm", "fedmitr", "fedmitr_plus", "stacking", "ensemble"]
PROTOCOL = {
    "profile": "smoke",
    "settings": {"task.scenes": 2, **SMALL_SETTINGS},
    "level": 0.05,
    "size": 0.01,
    "grounds": {
        "later": {
            "role": "secondary",
            "seeds": "30",
            "settings": {"partition.alpha": 0.5},
            "methods": ["ncm", "fedmitr_plus"],
        },
        "early": {
            "role": "primary",
            "seeds": "30-31",
            "settings": {"model.name": "vit_micro_early"},
            "methods": METHODS,
        },
    },
    "panels": {
        "heads": {
            "seeds": "30-31",
            "method": "ridge",
            "cells": {
                "λ = 1": {},
                "λ = 100": {"statistics.ridge": 100.0},
                "means": {"method": "ncm", "statistics.tokens": "cls"},
            },
        }
    },
    "claims": [
        {"claim": "best", "source": "ours", "where": ["early"], "better": "fedmitr_plus", "than": "rivals"},
        {
            "claim": "best with images",
            "source": "ours",
            "where": ["early"],
            "better": "fedmitr",
            "than": "images",
        },
        {
            "claim": "lift",
            "source": "ours",
            "where": ["early"],
            "better": "fedmitr_plus",
            "than": ["ridge_plus"],
        },
        {"claim": "penalty", "source": "ours", "where": ["heads"], "better": "λ = 100", "than": ["λ = 1"]},
    ],
}
