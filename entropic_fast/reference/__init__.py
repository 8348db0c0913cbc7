"""The obvious PyTorch version of every op: the tests' oracle and the fallback backend."""
