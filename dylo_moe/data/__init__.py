"""Data: where texts come from, how they become tokens, and how datasets are split and mixed."""

from dylo_moe.data.formats import Encoded, TextFormat, encode, encode_prompt, text_format
from dylo_moe.data.mixing import Collator, DatasetCounts, LoadedData, load_data
from dylo_moe.data.sources import SOURCES, Example, Reading, Source, read_source, source_name

__all__ = [
    "SOURCES",
    "Collator",
    "DatasetCounts",
    "Encoded",
    "Example",
    "LoadedData",
    "Reading",
    "Source",
    "TextFormat",
    "encode",
    "encode_prompt",
    "load_data",
    "read_source",
    "source_name",
    "text_format",
]
