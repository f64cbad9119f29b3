"""Loading models, scoring tokens with them, and the roles (base, sft, policy, critic) they play."""
