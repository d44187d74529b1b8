"""The samples that were made: in memory, on a disk, and over several ranks.

In memory

    protocol      ``Pool``, what a loader draws from, whoever holds the samples
    pool          ``SamplePool``, the samples of one process
    snapshot      what a reader sees of it: payloads, columns and batches at one moment
    memory_tiers  device, host and files, each up to its budget; placement: what would lie where
    record        the columns of a sample
    codecs        its payload: pixels, latents or JPEG
    batch         the form of a batch
    shared_list   lists and tables that grow without a copy

On a disk

    saver         writes new samples in the background
    reader        opens what was saved
    shards        the files: webdataset tars and their manifest
    rank_folders  the folders of several ranks
    owner         one process at a time writes a folder
    export        other people's formats, and back

Over several ranks

    sharded       ``ShardedPool``: who holds which sample, and how a training batch comes together
"""
