"""Model packs: a Hugging Face directory turned into the artifacts that Joulecast's engines read."""
