"""The files of a run directory: all outputs of a training run, and everything that is needed to use its model.

    config.json            the configuration, every field
    text_tokenizer.model   the text tokenizer (stages that read captions)
    image_tokenizer/       config.json and model.safetensors of the frozen image tokenizer (stages that read codes)
    checkpoints/           one directory per saved step; an exported or imported run has model.safetensors instead
    metrics.jsonl          one JSON object per line
    events/                the same metrics for TensorBoard
    samples/               step_XXXXXXXX.png
    bad_records.jsonl      invalid records of the data set, each with its error

A directory without config.json is not a run directory. config.json is written atomically. The directory may be a URL,
`gs://BUCKET/RUN` (remote_dir.py).
"""

from __future__ import annotations

CONFIG_FILE = "config.json"
TEXT_TOKENIZER_FILE = "text_tokenizer.model"
IMAGE_TOKENIZER_DIR = "image_tokenizer"
CHECKPOINTS_DIR = "checkpoints"
PARAMS_FILE = "model.safetensors"
METRICS_FILE = "metrics.jsonl"
