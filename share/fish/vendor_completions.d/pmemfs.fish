# Completion of pmemfs for fish. The program itself says what it understands.
_PMEMFS_COMPLETE=fish_source pmemfs 2>/dev/null | source
