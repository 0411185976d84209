#compdef virt-usher
# zsh completion for virt-usher; read at the first Tab after its name.
# virt-usher prints the function itself, so that it fits the click that is installed.
eval "$(_VIRT_USHER_COMPLETE=zsh_source virt-usher 2>/dev/null)"
# Reading this file was the answer to a Tab, and still owes it.
(( ! $+functions[_virt_usher_completion] )) || _virt_usher_completion "$@"
