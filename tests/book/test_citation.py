"""CITATION.cff is valid by the schema of its format, which cffconvert brings."""

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from fedmitr.core.paths import home


@pytest.fixture
def schema():
    found = importlib.util.find_spec("cffconvert") or pytest.skip("the book's tools are not installed")
    return json.loads((Path(found.origin).parent / "schemas" / "1.2.0" / "schema.json").read_text())


@pytest.fixture
def citation():
    return yaml.safe_load((home() / "CITATION.cff").read_text())


def test_the_citation_file_is_valid(schema, citation):
    jsonschema.validate(citation, schema)


def test_a_citation_file_without_authors_is_not(schema, citation):
    del citation["authors"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(citation, schema)
