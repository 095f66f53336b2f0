"""What the hook is made of beside Algorithm 1 (`gem_fast/gem.py`): when it projects, what it checks, what it says."""
