"""Many runs: each in a process of its own, and only those that have not finished."""
