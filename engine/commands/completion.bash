_engine_completion() {
    local IFS=$'\n' line current prefix= words=() i
    for ((i = 0; i <= COMP_CWORD; i++)); do  # bash takes `=` for a word of its own
        if ((i > 1)) && [[ ${COMP_WORDS[i]} == = || ${COMP_WORDS[i - 1]} == = ]]; then
            words[${#words[@]} - 1]+=${COMP_WORDS[i]}
        else
            words+=("${COMP_WORDS[i]}")
        fi
    done
    i=$((${#words[@]} - 1))
    current=${words[i]}
    [[ $current == *=* ]] && prefix=${current%%=*}=
    COMPREPLY=()
    for line in $(env COMP_WORDS="${words[*]}" COMP_CWORD="$i" _ENGINE_COMPLETE=bash_complete engine); do
        case $line in
            file,*) compopt -o filenames; COMPREPLY+=($(compgen -f -- "${current#"$prefix"}")) ;;
            dir,*) compopt -o filenames; COMPREPLY+=($(compgen -d -- "${current#"$prefix"}")) ;;
            plain,*) line=${line#plain,}; COMPREPLY+=("${line#"$prefix"}") ;;
        esac
    done
}
complete -o nosort -F _engine_completion engine
