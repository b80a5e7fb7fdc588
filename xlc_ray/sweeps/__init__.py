"""Many runs that share a base: which there are, which are cut short, the frontier that they find. No cluster here."""
