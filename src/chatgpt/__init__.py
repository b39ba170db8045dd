"""The import names of the 2023 script, `from chatgpt.nn import GPTActor`, on penstock's engine."""
