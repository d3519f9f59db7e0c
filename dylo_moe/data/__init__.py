"""Data: where texts come from, how they become tokens, and how datasets are split, mixed and packed."""

from .catalog import CATALOG, MACHINE_TEXT, Source
from .collator import Collator
from .contamination import Benchmarks, load_benchmarks
from .encoding import IGNORED, Encoded, TextFormat, encode, encode_prompt, text_format
from .formats import FORMATS, Columns, Example, Fate, Message, RowError, ask
from .loading import DatasetCounts, LoadedData, load_data
from .mixing import Share
from .packing import PackedTexts, check_texts_kept_apart, epoch_of, padding_share
from .places import locate, locate_all
from .reading import Reading, read
from .tables import Reason, Table, tokenise_all

__all__ = [
    "CATALOG",
    "FORMATS",
    "IGNORED",
    "MACHINE_TEXT",
    "Benchmarks",
    "Collator",
    "Columns",
    "DatasetCounts",
    "Encoded",
    "Example",
    "Fate",
    "LoadedData",
    "Message",
    "PackedTexts",
    "Reading",
    "Reason",
    "RowError",
    "Share",
    "Source",
    "Table",
    "TextFormat",
    "ask",
    "check_texts_kept_apart",
    "encode",
    "encode_prompt",
    "epoch_of",
    "load_benchmarks",
    "load_data",
    "locate",
    "locate_all",
    "padding_share",
    "read",
    "text_format",
    "tokenise_all",
]
