"""The way from the names of datasets to training batches.

The path of a row, from top to bottom; `loading.load_data` takes all but the last two steps, and its body is this list:

    sources/locate      a name, path or hub id as typed -> `DatasetSource`: which dataset is meant
    sources/read        `DatasetSource` -> `SourceRows`: its rows as they are published, found in one of these ways:
        sources/files           local files and mirrors, row by row, a broken row with the reason
        sources/hub             the Hugging Face hub, or the copies that its client keeps
        sources/machine_text    text of installed packages, cut by sources/pieces
    tokenized           `SourceRows` -> `TokenizedDataset`: one column for each fact that decides about a row
        tokenizing              on all cores, and cached: each raw row goes through the three below
            sources/formats             a raw row -> `examples.Example`: a prompt and a response, or a text; the turns
                                        of a conversation are read by sources/conversations
            contamination               does it hold a problem of HumanEval or MBPP?
            encoding                    `Example` -> token ids and labels, within max_seq_length: `templates` writes it
                                        as text in which `control_tokens` are hidden, `token_rows` as token ids
    splitting           duplicates are marked, some rows held out, and a share of the rest is used
    mixing              how many rows each dataset gives to an epoch, and in which order they come
    packing             several texts in one row (--packing)
    collator            rows -> padded batches

A row that is not trained on is never dropped in silence: it keeps its `Fate` and the reason, and is counted in
`loading.DatasetCounts`. The options of all steps are the fields of `config.DataConfig`; sources/catalog lists the
datasets that have a name.
"""
