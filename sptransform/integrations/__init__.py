"""What other libraries need to use ours; each is a module that its users import, and that nothing else imports."""
