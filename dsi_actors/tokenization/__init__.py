"""What dsi_actors/tokenizer.py is made of: text from tokens, chat templates, control tokens in messages, bounds."""
