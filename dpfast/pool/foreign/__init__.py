"""Other people's datasets as pools: parquet, webdataset tars, and image folders.

splits      which files of a folder are data, and of which split
intake      the pool that takes their samples in, each checked
parquet     images in columns, as Hugging Face ``datasets`` writes them, and our own export
tars        webdataset shards
images      image folders with a metadata.jsonl, with class folders, or with both
"""
