"""The only folder that imports SGLang: the round in the host's types, and the host's promises checked."""
