"""Demonstrations and prompts: files in, tokenised records and an honest report out."""
