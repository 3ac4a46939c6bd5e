# Completion of pmemfs for fish. Written by scripts/completions. Do not edit.

# Whether the next word belongs to a command ("": its name is still missing), and at which place.
function __pmemfs_at -a command place
    set -l words (commandline -opc)
    set -l found ''
    set -l places 0
    set -e words[1]
    while set -q words[1]
        set -l word $words[1]
        set -e words[1]
        switch $word
            case '--*=*'
            case '-*'
                contains -- "$found $word" $__pmemfs_takers; and set -e words[1]
            case '*'
                if test -z "$found"
                    set found $word
                else
                    set places (math $places + 1)
                end
        end
    end
    test "$found" = "$command"; or return
    test -z "$place"; or test "$place" = "$places"
end

set -g __pmemfs_takers 'create --size' 'create --mode' 'create --scheme' 'create --page-size' 'create --align' 'create --name' 'mount -o' 'mount --engine' 'mount --transport' 'pages --hottest' 'pages --by' 'pages --watch' 'pages --count' 'pages --color' 'pages --picture' 'pages --file' 'pages --pfn' 'stat --watch' 'stat --count' 'list --dir' 'resize --size' 'compare --medium' 'compare --size' 'compare --rounds' 'compare --seconds' 'compare --idle' 'compare --device' 'compare --report'
complete -c pmemfs -f
complete -c pmemfs -n '__pmemfs_at ""' -a create -d 'Make a pool of a file or a device.'
complete -c pmemfs -n '__pmemfs_at ""' -a mount -d 'Mount POOL on the directory MOUNTPOINT.'
complete -c pmemfs -n '__pmemfs_at ""' -a umount -d 'Unmount MOUNTPOINT, or POOL wherever it is mounted.'
complete -c pmemfs -n '__pmemfs_at ""' -a info -d 'Show the pool TARGET, or the mount on TARGET.'
complete -c pmemfs -n '__pmemfs_at ""' -a pages -d 'Count the page structures of a mount, and show the hottest pages.'
complete -c pmemfs -n '__pmemfs_at ""' -a stat -d 'Show what a mount has answered, how fast, and who did.'
complete -c pmemfs -n '__pmemfs_at ""' -a extents -d 'Show where a file of a mount lies in the pool.'
complete -c pmemfs -n '__pmemfs_at ""' -a copy -d 'Copy a file or a device into a mount, or out of one.'
complete -c pmemfs -n '__pmemfs_at ""' -a list -d 'List all mounts, and those whose daemon does not answer.'
complete -c pmemfs -n '__pmemfs_at ""' -a resize -d 'Make a pool larger, mounted or not.'
complete -c pmemfs -n '__pmemfs_at ""' -a trim -d 'Give back the memory that no file of a mount uses.'
complete -c pmemfs -n '__pmemfs_at ""' -a check -d 'Verify a pool that is not mounted, and repair it.'
complete -c pmemfs -n '__pmemfs_at ""' -a doctor -d 'Show what this machine offers, and what would be faster.'
complete -c pmemfs -n '__pmemfs_at ""' -a compare -d 'Compare the ways to keep page structures, side by side.'
complete -c pmemfs -n '__pmemfs_at ""' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at ""' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at ""' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at ""' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at ""' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at create' -l size -x -d 'Size of the file, such as 4G; devices have theirs.'
complete -c pmemfs -n '__pmemfs_at create' -l mode -x -a 'block fs' -d 'What the pool serves: one device as large as it, or files and directories.'
complete -c pmemfs -n '__pmemfs_at create' -l scheme -x -a 'pmem on-demand none' -d 'Where page structures live: in the pool, in DRAM, or nowhere.'
complete -c pmemfs -n '__pmemfs_at create' -l page-size -x -a '4K 2M 1G' -d 'What one page structure covers.'
complete -c pmemfs -n '__pmemfs_at create' -l align -x -d 'Alignment of the data.'
complete -c pmemfs -n '__pmemfs_at create' -l name -x -d 'Name of the pool and its volume.'
complete -c pmemfs -n '__pmemfs_at create' -l sparse -d 'Take memory only when it is written to.'
complete -c pmemfs -n '__pmemfs_at create' -l force -d 'Overwrite whatever is there.'
complete -c pmemfs -n '__pmemfs_at create' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at create' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at create' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at create' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at create' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at create 0' -r -F
complete -c pmemfs -n '__pmemfs_at mount' -s o -x -a '(__fish_append , ro rw allow_other populate huge_pages cached degraded uid= gid= mode= engine=native engine=python transport=auto transport=uring transport=fd async atime dev dirsync exec noatime nodev noexec nosuid nosymfollow suid symfollow sync strictatime nostrictatime relatime norelatime nodiratime diratime remount)' -d 'Mount options, separated by commas.'
complete -c pmemfs -n '__pmemfs_at mount' -s r -l read-only -d 'The same as -o ro.'
complete -c pmemfs -n '__pmemfs_at mount' -l engine -x -a 'native python' -d 'Who answers reads and writes; the same as -o engine=…'
complete -c pmemfs -n '__pmemfs_at mount' -l transport -x -a 'auto uring fd' -d 'How the native engine talks to the kernel: FUSE over io_uring, or reads of /dev/fuse; the same as -o transport=…'
complete -c pmemfs -n '__pmemfs_at mount' -l foreground -d 'Stay, and log to standard error.'
complete -c pmemfs -n '__pmemfs_at mount' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at mount' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at mount' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at mount' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at mount' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at mount 0' -r -F
complete -c pmemfs -n '__pmemfs_at mount 1' -x -a '(__fish_complete_directories)'
complete -c pmemfs -n '__pmemfs_at umount' -s l -l lazy -d 'Detach now, end when nobody uses it any more.'
complete -c pmemfs -n '__pmemfs_at umount' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at umount' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at umount' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at umount' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at umount' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at umount 0' -r -F
complete -c pmemfs -n '__pmemfs_at info' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at info' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at info' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at info' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at info' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at info 0' -r -F
complete -c pmemfs -n '__pmemfs_at pages' -l hottest -x -d 'How many of the pages with the most transfers to show.'
complete -c pmemfs -n '__pmemfs_at pages' -l map -d 'Draw a map of all pages instead.'
complete -c pmemfs -n '__pmemfs_at pages' -l by -x -a 'state reads writes owner' -d 'What the map shows.'
complete -c pmemfs -n '__pmemfs_at pages' -l watch -x -d 'Report again every so many seconds (1), until Ctrl-C.'
complete -c pmemfs -n '__pmemfs_at pages' -l count -x -d 'End --watch after N reports.'
complete -c pmemfs -n '__pmemfs_at pages' -l color -x -a 'auto always never' -d 'Whether the map has colours.'
complete -c pmemfs -n '__pmemfs_at pages' -l picture -r -F -d 'Draw the map into a .svg or .png, which needs matplotlib.'
complete -c pmemfs -n '__pmemfs_at pages' -l file -r -F -d 'Show the pages of one file.'
complete -c pmemfs -n '__pmemfs_at pages' -l pfn -x -d 'Show all that is known of one page.'
complete -c pmemfs -n '__pmemfs_at pages' -l pins -d 'Show which processes hold which pages.'
complete -c pmemfs -n '__pmemfs_at pages' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at pages' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at pages' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at pages' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at pages' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at pages 0' -r -F
complete -c pmemfs -n '__pmemfs_at stat' -l watch -x -d 'Report again every so many seconds (1), on what came since, until Ctrl-C.'
complete -c pmemfs -n '__pmemfs_at stat' -l count -x -d 'End --watch after N reports.'
complete -c pmemfs -n '__pmemfs_at stat' -l per-cpu -d 'Show each worker of the data plane, too.'
complete -c pmemfs -n '__pmemfs_at stat' -l latency -d 'Show percentiles of the latencies, too.'
complete -c pmemfs -n '__pmemfs_at stat' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at stat' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at stat' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at stat' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at stat' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at stat 0' -r -F
complete -c pmemfs -n '__pmemfs_at extents' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at extents' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at extents' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at extents' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at extents' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at extents 0' -r -F
complete -c pmemfs -n '__pmemfs_at copy' -l direct -d 'Fail where bytes would go through a buffer.'
complete -c pmemfs -n '__pmemfs_at copy' -s n -l no-clobber -d 'Leave a DST that is there as it is.'
complete -c pmemfs -n '__pmemfs_at copy' -s f -l force -d 'Replace a DST that may not be written to, too.'
complete -c pmemfs -n '__pmemfs_at copy' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at copy' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at copy' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at copy' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at copy' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at copy 0' -r -F
complete -c pmemfs -n '__pmemfs_at copy 1' -r -F
complete -c pmemfs -n '__pmemfs_at list' -l all -d 'Look for pools that are not mounted, too.'
complete -c pmemfs -n '__pmemfs_at list' -l dir -x -a '(__fish_complete_directories)' -d 'Look in this directory, too, as --all does; may be said several times.'
complete -c pmemfs -n '__pmemfs_at list' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at list' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at list' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at list' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at list' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at resize' -l size -x -d 'The new size, such as 8G; devices have theirs.'
complete -c pmemfs -n '__pmemfs_at resize' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at resize' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at resize' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at resize' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at resize' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at resize 0' -r -F
complete -c pmemfs -n '__pmemfs_at trim' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at trim' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at trim' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at trim' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at trim' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at trim 0' -x -a '(__fish_complete_directories)'
complete -c pmemfs -n '__pmemfs_at check' -l repair -d 'Repair what is wrong, and free what has leaked.'
complete -c pmemfs -n '__pmemfs_at check' -l force -d 'With --repair: also where that may lose or change what is in files.'
complete -c pmemfs -n '__pmemfs_at check' -s n -l dry-run -d 'Say what --repair would do first; write nothing.'
complete -c pmemfs -n '__pmemfs_at check' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at check' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at check' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at check' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at check' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at check 0' -r -F
complete -c pmemfs -n '__pmemfs_at doctor' -l fix -d 'Change the settings that last until the next boot; for root.'
complete -c pmemfs -n '__pmemfs_at doctor' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at doctor' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at doctor' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at doctor' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at doctor' -s h -l help -d 'Show this message and exit.'
complete -c pmemfs -n '__pmemfs_at compare' -l medium -x -a '(__fish_complete_directories)' -d 'A directory where the pools are made, one at a time.'
complete -c pmemfs -n '__pmemfs_at compare' -l size -x -d 'Size of each pool; pages of 1G need more than 2G.'
complete -c pmemfs -n '__pmemfs_at compare' -l rounds -x -d 'How often each answer has its turn; a verdict needs 5.'
complete -c pmemfs -n '__pmemfs_at compare' -l seconds -x -d 'How long each of four kinds of I/O is measured.'
complete -c pmemfs -n '__pmemfs_at compare' -l idle -x -d 'How long to wait, once, for idle structures to be dropped; 0: not at all.'
complete -c pmemfs -n '__pmemfs_at compare' -l device -r -F -d 'A device or file that transfers are read from.'
complete -c pmemfs -n '__pmemfs_at compare' -l report -r -F -d 'Write a report with plots, too, one file that needs no other.'
complete -c pmemfs -n '__pmemfs_at compare' -l json -d 'Print JSON for programs; errors too.'
complete -c pmemfs -n '__pmemfs_at compare' -s q -l quiet -d 'Say nothing but errors.'
complete -c pmemfs -n '__pmemfs_at compare' -s v -l verbose -d 'Say more: what is done, and why.'
complete -c pmemfs -n '__pmemfs_at compare' -s V -l version -d 'Show the version and exit.'
complete -c pmemfs -n '__pmemfs_at compare' -s h -l help -d 'Show this message and exit.'
