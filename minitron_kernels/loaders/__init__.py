"""Where models come from: names and Hub ids, checkpoints of either format, tokenizers."""
