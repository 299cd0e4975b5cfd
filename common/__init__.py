"""What all milestones share: configuration, weights, model, tokenizer, sampling, requests, CLI."""
