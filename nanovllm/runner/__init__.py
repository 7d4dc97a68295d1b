"""From arrays to sampled tokens: one forward pass, then one token for each row that wants one. Start reading at native_model_runner.py."""
