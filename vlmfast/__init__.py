"""vlmfast: vision-language models, cheaper to run and less prone to hallucinate, without retraining."""
