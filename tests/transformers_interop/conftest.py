"""The registration of our classes, for one file of tests at a time."""

from collections.abc import Iterator

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import phi35


@pytest.fixture(scope="module", autouse=True)
def registration() -> Iterator[None]:
    """Registers for one file alone: other tests of the process mean transformers' own classes."""
    models = (AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping)
    tables = [mapping._extra_content for mapping in (CONFIG_MAPPING, PROCESSOR_MAPPING, *models)]
    before = [dict(table) for table in tables]
    phi35.interop.register()
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
