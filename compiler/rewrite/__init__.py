"""How passes change programs: rules, patterns, edits by hand, what is read off a program first, and the runner."""
