//! Cases about paths, programs, signals and modes, whose results must not tell that there are no namespaces.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use ovenbird_sandbox::Level;

use crate::cases::{Case, nothing};

const TRACED: &[Level] = &[Level::Traced];
/// There is something in `/proc`.
const PROC: &[Level] = &[Level::Root, Level::Rootless, Level::SingleId, Level::Traced];

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "modes_that_shut_out",
            levels: TRACED,
            script: r#"
                mkdir -m 0 d; echo x >d/f; chmod 0 d/f; echo y >>d/f; cat d/f; stat -c %a d d/f
                echo z >r; chmod 444 r; echo w >r; stat -c %a r; chmod 640 r; stat -c %a r
                cp -a d e; stat -c %a e e/f; cat low/closed; stat -c %a low/closed; ls low/shut; stat -c %a low/shut
                chmod 700 low/shut; stat -c %a low/shut; [ -w r ] && [ -w d/f ] && echo writable; chmod 0 low/closed
            "#,
            set_up: |place, step| {
                fs::create_dir_all(place.path("lower/low/shut")).unwrap();
                fs::write(place.path("lower/low/closed"), "closed\n").unwrap();
                step.lower_owners = vec![
                    ("low/closed".into(), 5, 6, Some((libc::S_IFREG, 0, 0))),
                    ("low/shut".into(), 0, 0, Some((libc::S_IFDIR | 0o500, 0, 0))),
                ];
            },
            check: |ran| {
                ran.says("x\ny\n0\n0\n444\n640\n0\n0\nclosed\n0\n500\n700\nwritable\n");
                let want = [
                    ("d".into(), 0, 0, Some((libc::S_IFDIR, 0, 0))),
                    ("d/f".into(), 0, 0, Some((libc::S_IFREG, 0, 0))),
                    ("e".into(), 0, 0, Some((libc::S_IFDIR, 0, 0))),
                    ("e/f".into(), 0, 0, Some((libc::S_IFREG, 0, 0))),
                    ("low/closed".into(), 5, 6, Some((libc::S_IFREG, 0, 0))),
                ];
                assert_eq!(ran.outcome().owners, want);
                // Whoever reads the result is no root either.
                assert_eq!(fs::metadata(ran.changes().join("d")).unwrap().mode() & 0o777, 0o700);
                assert_eq!(fs::read(ran.changes().join("d/f")).unwrap(), b"x\ny\n");
            },
        },
        Case {
            name: "groups_of_folders_are_inherited",
            levels: TRACED,
            script: "mkdir d; chown 0:50 d; chmod 2775 d; mkdir d/sub; touch d/f d/sub/f; stat -c '%g %a' d/sub d/f d/sub/f",
            set_up: nothing,
            check: |ran| ran.says("50 2755\n50 644\n50 644\n"),
        },
        Case {
            name: "scripts_and_programs",
            // The shell starts itself again for a program without a first line.
            levels: PROC,
            script: r#"
                printf '#!/bin/sh -e\necho one "$0" "$@"\n' >/one; printf '#!/one arg\nnever\n' >/two; printf '#!/nowhere\n' >/three
                echo 'echo text' >/four; chmod 755 /one /two /three /four
                /one a 'b c'; /two x; (cd /; ./one .); /three 2>/dev/null || echo $?; sh /four; /four
                exec /bin/busybox echo end
            "#,
            set_up: nothing,
            check: |ran| ran.says("one /one a b c\none /one arg /two x\none ./one .\n127\ntext\ntext\nend\n"),
        },
        Case {
            name: "links_and_loops",
            levels: PROC,
            script: r#"
                mkdir -p a/b; ln -s /a/b abs; ln -s ../../../../etc/up out; ln -s loop loop; echo x >abs/f; cat a/b/f; cat loop 2>/dev/null || echo loop
                (cd abs; pwd -P; cd -P ..; pwd); (cd -P /../../bin; pwd); (cd /proc/self/cwd/a; pwd -P); readlink -f abs/f; readlink /proc/self/exe
                mv a c; cat abs/f 2>/dev/null || echo moved; mkdir -p a/b; echo y >a/b/f; cat abs/f; echo via | tee /dev/fd/1
                mkdir -p etc; echo z >out; cat etc/up; rm -r a; ln -s c a; cat a/b/f; rm abs; mkdir abs; [ -d abs ] && echo folder
                rm -r abs; ln -s c/b abs; cat abs/f; mv c e; ln -s e c; cat abs/f
            "#,
            set_up: nothing,
            check: |ran| ran.says("x\nloop\n/a/b\n/a\n/bin\n/a\n/a/b/f\n/bin/busybox\nmoved\ny\nvia\nvia\nz\nx\nfolder\nx\nx\n"),
        },
        Case {
            name: "signals_and_jobs",
            levels: PROC,
            script: r#"
                trap 'echo usr' USR1; kill -USR1 $$; (trap 'echo term; exit 3' TERM; while :; do sleep 0.1; done) & sleep 0.3; kill $!; wait $!; echo $?
                sleep 100 & sleep 0.1; kill -STOP $!; sleep 0.1; grep State /proc/$!/status | cut -f 2 | cut -c 1; kill -CONT $!; kill $!; wait $! 2>/dev/null; echo $?
                mkfifo p; (echo through >p) & cat p; i=0; while [ $i -lt 50 ]; do (:) & i=$((i+1)); done; wait; echo done
            "#,
            set_up: nothing,
            check: |ran| {
                let want = |state: &str| format!("usr\nterm\n3\n{state}\n143\nthrough\ndone\n");
                // A stopped process that is traced is said to be so.
                assert!(ran.out == want("T") || ran.out == want("t"), "{}{}", ran.out, ran.err);
            },
        },
        Case {
            name: "programs_for_32_bits_are_refused",
            levels: TRACED,
            script: r"(printf '\177ELF\001\001\001'; head -c 200 /dev/zero) >/five; chmod 755 /five; env /five; echo $?",
            set_up: nothing,
            check: |ran| {
                // A shell goes on with it as a script.
                assert!(ran.out != "0\n" && ran.err.contains("32-bit program"), "{}{}", ran.out, ran.err);
            },
        },
    ]
}
