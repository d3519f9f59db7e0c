"""Learning skill after skill: the skill library, novelty, growth, and gate rows fitted to the library."""
