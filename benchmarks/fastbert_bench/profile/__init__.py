"""`fastbert profile step` and `kernel`: where the time goes."""
