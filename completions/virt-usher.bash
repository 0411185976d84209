# bash completion for virt-usher; read at the first Tab after its name.
# virt-usher prints the function itself, so that it fits the click that is installed.
eval "$(_VIRT_USHER_COMPLETE=bash_source virt-usher 2>/dev/null)"
