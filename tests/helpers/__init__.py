"""What several test files share: fixtures, services, processes. Test files import it as `helpers`."""
