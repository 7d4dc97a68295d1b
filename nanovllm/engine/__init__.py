"""Many requests, one network: requests, scheduler, block manager, batching, step(), tokenizer. Start reading at engine.py."""
