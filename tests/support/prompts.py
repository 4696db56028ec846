"""Real prompts of different kinds and lengths."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics state that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at 100 degrees Celsius, and it freezes at",
    "Q: What is 17 + 25?\nA:",
    "In 1969, Neil Armstrong became the first person to walk on the Moon. " * 6 + "He said:",
]
