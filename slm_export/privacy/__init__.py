"""Personal data in texts: found, and replaced before anything learns from them or leaves this machine.

    entities    what is looked for: names, defaults, and a user's own from TOML
    patterns    recognizers of ours beside Presidio's: keys, wallets, street addresses, names that are introduced
    finder      `Finder`: Presidio's engine, told never to ask the network and never to skip
    anonymise   `anonymised(text, ...)`: replace, hash or drop what was found
    files       whole files and folders, and what was found in them, counted

What is found never reaches a log, an error or a file but as its kind and its number.
"""
