"""What is read from disk or network, with distrust: corpora, config.json, safetensors shards."""
