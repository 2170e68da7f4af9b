//! The container core through its gRPC interface, on this machine's kernel.
#![allow(clippy::unwrap_used)]

mod common;

use a3s_box_api::agent::v1::{self as api, exec_input};
use common::{
    Sandbox, code, exec_start, id, make_layer, program, read_exec, read_io, read_io_until,
    read_until, shell, within,
};
use serde_json::{Value, json};
use std::{fs, time::Duration};
use tonic::Code;

const KILLED: i32 = 128 + 9;

#[tokio::test]
async fn a_program_runs_and_its_output_and_exit_are_told() {
    let mut sandbox = Sandbox::start().await;
    let said =
        sandbox.run(shell(1, "echo out; echo err >&2; pwd; echo $HOME; echo $$; exit 7")).await;
    assert_eq!(said.stdout, "out\n/\n/root\n1\n");
    assert_eq!(said.stderr, "err\n");
    assert_eq!((said.exit.code, said.exit.signal), (7, 0));
    assert!(said.exit.exited_at > 1_600_000_000_000_000_000);
    sandbox.end().await;
}

#[tokio::test]
async fn init_waits_for_start_and_a_signal_ends_it_with_its_number() {
    let mut sandbox = Sandbox::start().await;
    let mark = sandbox.volume("mark");
    let wanted = shell(1, "trap 'exit 3' TERM; touch /mark/ran; while :; do sleep 0.05; done");
    let created = sandbox.create(wanted.bind(&mark, "/mark", &["rbind"])).await.unwrap();
    assert!(created.guest_pid > 1);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!mark.join("ran").exists());
    sandbox.start(1).await.unwrap();
    while !mark.join("ran").exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(code(sandbox.start(1).await).0, Code::FailedPrecondition);
    sandbox.signal(1, 15, false).await.unwrap();
    assert_eq!(sandbox.exit_of(1).await.code, 3);
    sandbox.signal(1, 15, false).await.unwrap();

    sandbox.create(program(2, &["sleep", "1000"])).await.unwrap();
    sandbox.start(2).await.unwrap();
    sandbox.signal(2, 9, false).await.unwrap();
    let exit = sandbox.exit_of(2).await;
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (KILLED, 9, false));
    sandbox.end().await;
}

#[tokio::test]
async fn a_command_that_cannot_run_is_named_by_start() {
    let mut sandbox = Sandbox::start().await;
    for (number, command, expected, text) in [
        (1, "nothing", Code::NotFound, "exec: \"nothing\": executable file not found in $PATH"),
        (
            2,
            "/nothing",
            Code::NotFound,
            "exec: \"/nothing\": stat /nothing: no such file or directory",
        ),
        (3, "/etc/plain", Code::PermissionDenied, "exec: \"/etc/plain\": permission denied"),
        (4, "/etc", Code::PermissionDenied, "exec: \"/etc\": is a directory"),
        (5, "garbage", Code::InvalidArgument, "exec /bin/garbage: exec format error"),
    ] {
        sandbox.create(program(number, &[command])).await.unwrap();
        assert_eq!(code(sandbox.start(number).await), (expected, text.to_owned()));
        assert_eq!(sandbox.exit_of(number).await.code, 1);
        sandbox.remove(number).await.unwrap();
    }
    sandbox.create(program(9, &["sleep", "1000"])).await.unwrap();
    sandbox.start(9).await.unwrap();
    let (expected, text) = code(sandbox.exec(9, &["nothing"]).await);
    assert_eq!(
        (expected, text.as_str()),
        (Code::NotFound, "exec: \"nothing\": executable file not found in $PATH")
    );
    sandbox.end().await;
}

#[tokio::test]
async fn standard_input_reaches_the_program_and_ends_when_the_caller_says_so() {
    let mut sandbox = Sandbox::start().await;
    sandbox.create(program(1, &["cat"])).await.unwrap();
    let (input, mut outputs) = sandbox.io(1).await;
    sandbox.start(1).await.unwrap();
    let stdin = vec![b'x'; 300_000];
    let message = api::IoInput { stdin: stdin.clone().into(), ..api::IoInput::default() };
    let close = api::IoInput { close_stdin: true, ..api::IoInput::default() };
    let feeding = tokio::spawn(async move {
        input.send(message).await.unwrap();
        input.send(close).await.unwrap();
        input
    });
    let said = read_io(&mut outputs).await;
    assert_eq!(said.stdout.len(), stdin.len());
    drop((feeding.await.unwrap(), outputs));
    assert_eq!(sandbox.exit_of(1).await.code, 0);
    let other = sandbox.0.container_io(tokio_stream::iter([api::IoInput {
        container_id: id(1),
        ..api::IoInput::default()
    }]));
    assert_eq!(code(within(other).await).0, Code::FailedPrecondition, "its streams are taken");
    sandbox.end().await;
}

#[tokio::test]
async fn a_slow_reader_stops_the_writer_and_nobody_else() {
    let mut sandbox = Sandbox::start().await;
    let mark = sandbox.volume("mark");
    let command = "head -c 30000000 /dev/zero; touch /mark/done";
    sandbox.create(shell(1, command).bind(&mark, "/mark", &["rbind"])).await.unwrap();
    let (_, mut outputs) = sandbox.io(1).await;
    sandbox.start(1).await.unwrap();
    let said = sandbox.run(shell(2, "echo free")).await;
    assert_eq!(said.stdout, "free\n");
    assert!(!mark.join("done").exists(), "30 MB cannot be anywhere on the way");
    assert_eq!(read_io(&mut outputs).await.stdout.len(), 30_000_000);
    assert_eq!(sandbox.exit_of(1).await.code, 0);
    drop(outputs);
    sandbox.end().await;
}

#[tokio::test]
async fn output_written_before_anybody_listens_is_not_lost() {
    let mut sandbox = Sandbox::start().await;
    sandbox.create(shell(1, "echo early")).await.unwrap();
    sandbox.start(1).await.unwrap();
    sandbox.exit_of(1).await;
    let (_, mut outputs) = sandbox.io(1).await;
    assert_eq!(read_io(&mut outputs).await.stdout, "early\n");
    drop(outputs);
    sandbox.end().await;
}

#[tokio::test]
async fn a_terminal_is_the_containers_own_and_takes_a_size() {
    let mut sandbox = Sandbox::start().await;
    let wanted =
        shell(1, "tty; stat -c %t:%T /dev/console; echo ready; read line; stty size; echo $line")
            .with("/process/terminal", json!(true))
            .with("/process/consoleSize", json!({ "width": 90, "height": 30 }));
    sandbox.create(wanted).await.unwrap();
    let (input, mut outputs) = sandbox.io(1).await;
    let size = api::WindowSize { width: 100, height: 40 };
    input.send(api::IoInput { resize: Some(size), ..api::IoInput::default() }).await.unwrap();
    sandbox.start(1).await.unwrap();
    let before = read_io_until(&mut outputs, "ready\r\n").await.stdout;
    input.send(api::IoInput { stdin: "hello\n".into(), ..api::IoInput::default() }).await.unwrap();
    let said = read_io(&mut outputs).await;
    assert_eq!(
        before + &said.stdout,
        "/dev/pts/0\r\n88:0\r\nready\r\nhello\r\n40 100\r\nhello\r\n"
    );
    drop((input, outputs));
    sandbox.end().await;
}

#[tokio::test]
async fn exec_joins_the_container_and_tells_its_own_exit() {
    let mut sandbox = Sandbox::start().await;
    let wanted = program(1, &["sleep", "1000"])
        .with("/process/env", json!(["PATH=/bin", "A=b"]))
        .with("/process/cwd", json!("/home/new"))
        .user(api::User {
            user: "user".into(),
            supplemental_groups: vec![77],
            ..api::User::default()
        });
    let created = sandbox.create(wanted).await.unwrap();
    assert_eq!((created.uid, created.gid, created.groups), (1000, 1000, vec![1000, 2000, 77]));
    assert_eq!(code(sandbox.exec(1, &["true"]).await).0, Code::FailedPrecondition, "not started");
    sandbox.start(1).await.unwrap();
    let script = "id -u; id -G; pwd; echo $A; readlink /proc/self/ns/mnt >/dev/null && echo $HOME; cat /proc/1/cmdline; exit 5";
    let said = sandbox.exec(1, &["sh", "-c", script]).await.unwrap();
    assert_eq!(
        said.stdout, "1000\n1000 77 2000\n/home/new\nb\n/home/user\nsleep\u{0}1000\u{0}",
        "{}",
        said.stderr
    );
    assert_eq!((said.exit.code, said.exit.signal), (5, 0));
    let said = sandbox.exec(1, &["sh", "-c", "kill -9 $$"]).await.unwrap();
    assert_eq!((said.exit.code, said.exit.signal), (KILLED, 9));
    let said = sandbox.exec(1, &["cat"]).await.unwrap();
    assert_eq!(said.exit.code, 0, "without stdin there is nothing to read");
    assert_eq!(
        fs::read_dir(sandbox.cgroups.join(id(1)))
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().is_dir())
            .count(),
        0
    );
    sandbox.end().await;
}

#[tokio::test]
async fn a_dropped_exec_takes_all_its_descendants_with_it_and_nobody_else() {
    let mut sandbox = Sandbox::start().await;
    sandbox.create(program(1, &["sleep", "1000"])).await.unwrap();
    sandbox.start(1).await.unwrap();
    let script = "setsid sh -c 'sleep 2001 & sleep 2002' & sleep 2003 & echo up; sleep 2004";
    let (input, mut outputs) =
        sandbox.exec_stream(exec_start(1, &["sh", "-c", script])).await.unwrap();
    read_until(&mut outputs, "up").await;
    let sleeping = async |sandbox: &mut Sandbox| {
        let said = sandbox
            .exec(1, &["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"])
            .await
            .unwrap();
        said.stdout.matches("sleep 2").count()
    };
    drop((input, outputs));
    let mut left = sleeping(&mut sandbox).await;
    for _ in 0..1000 {
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        left = sleeping(&mut sandbox).await;
    }
    assert_eq!(left, 0);
    assert_eq!(sandbox.exec(1, &["true"]).await.unwrap().exit.code, 0, "the container lives");
    sandbox.end().await;
}

#[tokio::test]
async fn what_an_exec_leaves_running_stays_and_does_not_hold_the_call() {
    let mut sandbox = Sandbox::start().await;
    sandbox.create(program(1, &["sleep", "1000"])).await.unwrap();
    sandbox.start(1).await.unwrap();
    let script = "(while :; do echo noise; sleep 0.01; done) & echo $! > /tmp/pid; echo left";
    let said = sandbox.exec(1, &["sh", "-c", script]).await.unwrap();
    assert!(said.stdout.contains("left"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        sandbox.exec(1, &["sh", "-c", "kill -0 $(cat /tmp/pid)"]).await.unwrap().exit.code,
        0
    );
    sandbox.end().await;
}

#[tokio::test]
async fn an_exec_may_outlive_its_call_and_finds_its_stdin_ended() {
    let mut sandbox = Sandbox::start().await;
    sandbox.create(program(1, &["sleep", "1000"])).await.unwrap();
    sandbox.start(1).await.unwrap();
    // More than a pipe holds: nobody may hold it up.
    let script = "echo begun; cat; yes | head -n 100000; echo through > /tmp/said";
    let start =
        api::ExecStart { stdin: true, outlives_call: true, ..exec_start(1, &["sh", "-c", script]) };
    let (input, mut outputs) = sandbox.exec_stream(start).await.unwrap();
    read_until(&mut outputs, "begun").await;
    drop((input, outputs));
    let wait = "while [ ! -e /tmp/said ]; do sleep 0.01; done; cat /tmp/said";
    assert_eq!(sandbox.exec(1, &["sh", "-c", wait]).await.unwrap().stdout, "through\n");
    sandbox.end().await;
}

#[tokio::test]
async fn exec_takes_input_signals_and_a_terminal() {
    let mut sandbox = Sandbox::start().await;
    sandbox.create(program(1, &["sleep", "1000"])).await.unwrap();
    sandbox.start(1).await.unwrap();
    let start = api::ExecStart { stdin: true, ..exec_start(1, &["cat"]) };
    let (input, mut outputs) = sandbox.exec_stream(start).await.unwrap();
    let send = async |kind| input.send(api::ExecInput { kind: Some(kind) }).await.unwrap();
    send(exec_input::Kind::Stdin("hello".into())).await;
    send(exec_input::Kind::CloseStdin(true)).await;
    assert_eq!(read_exec(&mut outputs).await.unwrap().stdout, "hello");
    drop((input, outputs));

    let start = api::ExecStart {
        tty: true,
        stdin: true,
        ..exec_start(1, &["sh", "-c", "tty; echo ready; read x; stty size"])
    };
    let (input, mut outputs) = sandbox.exec_stream(start).await.unwrap();
    let send = async |kind| input.send(api::ExecInput { kind: Some(kind) }).await.unwrap();
    send(exec_input::Kind::Resize(api::WindowSize { width: 70, height: 20 })).await;
    assert_eq!(read_until(&mut outputs, "ready\r\n").await, "/dev/pts/0\r\nready\r\n");
    send(exec_input::Kind::Stdin("\n".into())).await;
    assert_eq!(read_exec(&mut outputs).await.unwrap().stdout, "\r\n20 70\r\n");
    drop((input, outputs));

    let (input, mut outputs) =
        sandbox.exec_stream(exec_start(1, &["sleep", "1000"])).await.unwrap();
    input.send(api::ExecInput { kind: Some(exec_input::Kind::Signal(15)) }).await.unwrap();
    assert_eq!(read_exec(&mut outputs).await.unwrap().exit.signal, 15);
    drop((input, outputs));
    sandbox.end().await;
}

fn status_field(status: &str, name: &str) -> String {
    let line = status
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_else(|| panic!("{name} in {status}"));
    line.split_once(':').unwrap().1.trim().to_owned()
}

#[tokio::test]
async fn capabilities_are_exactly_the_specs_for_init_and_exec() {
    let mut sandbox = Sandbox::start().await;
    let caps = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN"],
        "inheritable": ["CAP_CHOWN", "CAP_KILL"],
        "ambient": ["CAP_KILL"],
    });
    let wanted = shell(1, "cat /proc/self/status; echo ready; exec sleep 1000")
        .with("/process/capabilities", caps)
        .user(api::User { uid: Some(1000), ..api::User::default() });
    sandbox.create(wanted).await.unwrap();
    let (_, mut outputs) = sandbox.io(1).await;
    sandbox.start(1).await.unwrap();
    let by_init = read_io_until(&mut outputs, "ready").await.stdout;
    drop(outputs);
    let by_exec = sandbox.exec(1, &["cat", "/proc/self/status"]).await.unwrap().stdout;
    for status in [by_init, by_exec] {
        let field = |name| u64::from_str_radix(&status_field(&status, name), 16).unwrap();
        let (chown, kill, net_raw) = (1, 1 << 5, 1 << 13);
        assert_eq!(field("CapBnd"), chown | kill | net_raw);
        assert_eq!(field("CapInh"), chown | kill);
        // A user's program keeps what is ambient.
        assert_eq!((field("CapPrm"), field("CapEff"), field("CapAmb")), (kill, kill, kill));
        assert_eq!(status_field(&status, "NoNewPrivs"), "0");
        assert_eq!(status_field(&status, "Uid"), "1000\t1000\t1000\t1000");
    }

    let none = shell(2, "cat /proc/self/status")
        .with("/process/capabilities", Value::Null)
        .with("/process/noNewPrivileges", json!(true));
    let status = sandbox.run(none).await.stdout;
    for set in ["CapBnd", "CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status_field(&status, set), "0000000000000000", "{set}");
    }
    assert_eq!(status_field(&status, "NoNewPrivs"), "1");
    sandbox.end().await;
}

#[tokio::test]
async fn seccomp_holds_for_init_and_for_exec_with_and_without_new_privileges() {
    let mut sandbox = Sandbox::start().await;
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat", "no_such_call_at_all"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
            // Nothing of the agent's own between filter and exec may need these.
            { "names": ["setuid", "setresuid", "setgroups", "chdir"], "action": "SCMP_ACT_ERRNO" },
            { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
              "args": [{ "index": 1, "value": 12, "op": "SCMP_CMP_EQ" }] },
        ],
    });
    for (number, nnp, uid) in [(1, false, 0), (2, true, 0), (3, false, 1000), (4, true, 1000)] {
        let script = "mkdir /tmp/a; kill -12 $$; kill -0 $$ && echo other signals work; cat /proc/self/status";
        let wanted = shell(number, &format!("{script}; echo ready; exec sleep 1000"))
            .with("/linux/seccomp", profile.clone())
            .with("/process/noNewPrivileges", json!(nnp))
            .user(api::User { uid: Some(uid), ..api::User::default() });
        sandbox.create(wanted).await.unwrap();
        let (_, mut outputs) = sandbox.io(number).await;
        sandbox.start(number).await.unwrap();
        let by_init = read_io_until(&mut outputs, "ready").await;
        drop(outputs);
        let by_exec = sandbox.exec(number, &["sh", "-c", script]).await.unwrap();
        for said in [by_init, by_exec] {
            let what = format!("nnp {nnp}, uid {uid}: {said:?}");
            assert!(
                said.stderr
                    .contains("mkdir: can't create directory '/tmp/a': Function not implemented"),
                "{what}"
            );
            assert!(said.stderr.contains("Operation not permitted"), "{what}");
            assert!(said.stdout.contains("other signals work"), "{what}");
            assert_eq!(status_field(&said.stdout, "Seccomp"), "2", "{what}");
            assert_eq!(status_field(&said.stdout, "NoNewPrivs"), if nnp { "1" } else { "0" });
        }
    }
    let refused =
        shell(9, "true").with("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_NOTIFY" }));
    assert_eq!(code(sandbox.create(refused).await).0, Code::Unimplemented);
    sandbox.end().await;
}

#[tokio::test]
async fn paths_are_masked_or_read_only_and_the_root_too_when_asked() {
    let mut sandbox = Sandbox::start().await;
    let wanted = shell(1, "/bin/ls; cat /proc/kcore | wc -c; ls -A /etc | wc -l; echo 1 > /proc/sys/vm/swappiness; touch /tmp/x; echo $?; touch /dev/x && echo dev")
        .with("/root/readonly", json!(true))
        .with("/linux/maskedPaths", json!(["/bin/ls", "/proc/kcore", "/etc"]));
    let said = sandbox.run(wanted).await;
    assert_eq!(said.stdout, "0\n0\n1\ndev\n");
    assert!(said.stderr.contains("/bin/ls: Permission denied"), "{}", said.stderr);
    assert!(
        said.stderr.contains("/proc/sys/vm/swappiness: Read-only file system"),
        "{}",
        said.stderr
    );
    assert!(said.stderr.contains("/tmp/x: Read-only file system"), "{}", said.stderr);
    sandbox.end().await;
}

#[tokio::test]
async fn volumes_are_mounted_as_asked_wherever_the_image_points() {
    let mut sandbox = Sandbox::start().await;
    let volume = sandbox.volume("data");
    fs::write(volume.join("file"), "content\n").unwrap();
    fs::create_dir(volume.join("below")).unwrap();
    rustix::mount::mount(
        "tmpfs",
        volume.join("below"),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    let wanted = shell(
        1,
        "cat /a/file /single; touch /a/new; touch /a/below/x; touch /b/x; touch /b/below/x && echo below; touch /c/below/x; cat /etc/resolv.conf; cat /run/resolve/stub.conf; echo w > /d/x/written",
    )
    .bind(&volume, "/a", &["rbind"])
    .bind(&volume, "/b", &["rbind", "ro"])
    .bind(&volume, "/c", &["rbind", "rro"])
    .bind(&volume, "/d/x", &["bind", "noexec"])
    .bind(&volume.join("file"), "/single", &["bind", "ro"]);
    let said = sandbox.run(wanted).await;
    assert_eq!(
        said.stdout, "content\ncontent\nbelow\nnameserver 10.9.8.7\nnameserver 10.9.8.7\n",
        "{}",
        said.stderr
    );
    assert!(
        said.stderr.contains("/b/x: Read-only") && said.stderr.contains("/c/below/x: Read-only"),
        "{}",
        said.stderr
    );
    assert!(
        volume.join("new").exists()
            && volume.join("below/x").exists()
            && volume.join("written").exists()
    );

    let missing = shell(2, "true").bind(&volume.join("none"), "/a", &["bind"]);
    let (expected, text) = code(sandbox.create(missing).await);
    assert!(
        expected == Code::Internal && text.contains("mount /a") && text.contains("no such file"),
        "{text}"
    );
    rustix::mount::unmount(volume.join("below"), rustix::mount::UnmountFlags::DETACH).unwrap();
    sandbox.end().await;
}

#[tokio::test]
async fn every_container_has_its_kernel_file_systems_and_devices() {
    let mut sandbox = Sandbox::start().await;
    let said = sandbox
        .run(shell(
            1,
            "for m in /proc /sys /dev /dev/pts /dev/shm /dev/mqueue /sys/fs/cgroup; do grep -q \" $m \" /proc/mounts || echo no $m; done
             echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; echo y > /dev/stdout
             cat /etc/hostname; cat /proc/self/cgroup | grep ^0; mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk
             echo shared > /dev/shm/x; stat -c %a /dev/shm; ls /proc/self/fd | wc -l",
        ))
        .await;
    assert_eq!(said.stdout, "4\n4\ny\npod\n0::/\n1777\n4\n");
    assert!(said.stderr.contains("/tmp/disk: Operation not permitted"), "{}", said.stderr);
    assert_eq!(sandbox.run(shell(2, "cat /dev/shm/x")).await.stdout, "shared\n");
    sandbox.end().await;
}

#[tokio::test]
async fn layers_are_stacked_shared_and_never_written() {
    let mut sandbox = Sandbox::start().await;
    make_layer(&sandbox.dir.path().join("share/images/top"), |root| {
        fs::create_dir(root.join("etc")).unwrap();
        fs::write(root.join("etc/plain"), "upper").unwrap();
        let whiteout = rustix::fs::makedev(0, 0);
        let mode = rustix::fs::Mode::empty();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("etc/group"),
            rustix::fs::FileType::CharacterDevice,
            mode,
            whiteout,
        )
        .unwrap();
    });
    let layers = ["images/base", "images/top"];
    let script =
        "cat /etc/plain; test -e /etc/group || echo gone; echo mine > /etc/plain; cat /etc/plain";
    for number in [1, 2] {
        let said = sandbox.run(shell(number, script).layers(&layers)).await;
        assert_eq!(said.stdout, "uppergone\nmine\n");
    }
    let mounted = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts
            .lines()
            .filter(|line| {
                line.contains(sandbox.dir.path().to_str().unwrap()) && line.contains("erofs")
            })
            .count()
    };
    assert_eq!(mounted(), 2);
    let mut calls = sandbox.calls.clone();
    calls.remove(1).await.unwrap();
    assert_eq!(mounted(), 2);
    calls.remove(2).await.unwrap();
    assert_eq!(mounted(), 0);
    for (layers, expected) in [
        (vec![], Code::InvalidArgument),
        (vec!["../x"], Code::InvalidArgument),
        (vec!["images/base", "images/none"], Code::Internal),
    ] {
        assert_eq!(
            code(calls.create(shell(3, "true").layers(&layers)).await).0,
            expected,
            "{layers:?}"
        );
    }
    assert_eq!(mounted(), 0, "a failed creation leaves nothing");
    drop(calls);
    sandbox.end().await;
}

#[tokio::test]
async fn pid_namespaces_are_the_containers_the_pods_or_a_targets() {
    let mut sandbox = Sandbox::start().await;
    let list = "cat /proc/[0-9]*/comm";
    sandbox.create(program(1, &["sleep", "1000"]).pid(api::PidMode::Pod, 0)).await.unwrap();
    sandbox.start(1).await.unwrap();
    let said = sandbox
        .run(shell(2, &format!("{list}; ls -A /proc/1/root/ | wc -l")).pid(api::PidMode::Pod, 0))
        .await;
    assert!(said.stdout.starts_with("pause\n") && said.stdout.contains("sleep\n"), "{said:?}");
    assert!(said.stderr.contains("denied") && said.stdout.ends_with("0\n"), "{said:?}");

    sandbox.create(program(3, &["sleep", "1000"])).await.unwrap();
    sandbox.start(3).await.unwrap();
    let said = sandbox.run(shell(4, list).pid(api::PidMode::Target, 3)).await;
    assert!(said.stdout.starts_with("sleep\n") && !said.stdout.contains("pause"), "{said:?}");
    let said = sandbox.run(shell(5, list)).await;
    assert!(!said.stdout.contains("sleep") && !said.stdout.contains("pause"), "{said:?}");
    sandbox.end().await;
}

#[tokio::test]
async fn when_init_ends_nothing_of_the_container_is_left() {
    let mut sandbox = Sandbox::start().await;
    let script = "setsid sh -c 'sleep 3001; true' & setsid sleep 3002 & echo up; exit 4";
    let said = sandbox.run(shell(1, script).pid(api::PidMode::Pod, 0)).await;
    assert_eq!((said.stdout.as_str(), said.exit.code), ("up\n", 4));
    let procs = fs::read_to_string(sandbox.cgroups.join(id(1)).join("cgroup.procs")).unwrap();
    assert_eq!(procs, "", "told before all were gone");
    let said = sandbox.run(shell(2, "cat /proc/[0-9]*/cmdline").pid(api::PidMode::Pod, 0)).await;
    assert!(!said.stdout.contains("300"), "{said:?}");
    sandbox.end().await;
}

#[tokio::test]
async fn remove_ends_a_running_container_and_is_fine_with_an_unknown_one() {
    let mut sandbox = Sandbox::start().await;
    sandbox.remove(1).await.unwrap();
    for started in [false, true] {
        sandbox.create(shell(1, "trap '' TERM; sleep 1000")).await.unwrap();
        assert_eq!(code(sandbox.create(shell(1, "true")).await).0, Code::AlreadyExists);
        if started {
            sandbox.start(1).await.unwrap();
        }
        sandbox.remove(1).await.unwrap();
        assert!(!sandbox.cgroups.join(id(1)).exists());
        assert_eq!(fs::read_dir(sandbox.dir.path().join("scratch")).unwrap().count(), 0);
    }
    assert_eq!(code(sandbox.start(1).await).0, Code::NotFound);
    assert_eq!(code(sandbox.signal(1, 9, false).await).0, Code::NotFound);
    sandbox.end().await;
}

#[tokio::test]
async fn a_creation_that_fails_says_why_and_leaves_nothing() {
    let mut sandbox = Sandbox::start().await;
    let user =
        |user: &str| shell(1, "true").user(api::User { user: user.into(), ..api::User::default() });
    for (wanted, expected, words) in [
        (user("nobody-knows"), Code::InvalidArgument, "no user \"nobody-knows\""),
        (shell(1, "true").with("/process/args", json!([])), Code::InvalidArgument, "process.args"),
        (
            shell(1, "true").with("/linux/resources", json!({ "memory": { "swappiness": 1 } })),
            Code::Unimplemented,
            "swappiness",
        ),
        (
            shell(1, "true").with("/linux/resources", json!({ "unified": { "foo.bar": "1" } })),
            Code::Unimplemented,
            "foo.bar",
        ),
        (
            shell(1, "true").with("/linux/sysctl", json!({ "kernel.none": "1" })),
            Code::InvalidArgument,
            "sysctl kernel.none = 1",
        ),
        (shell(1, "true").pid(api::PidMode::Target, 7), Code::NotFound, "no container"),
    ] {
        let (found, text) = code(sandbox.create(wanted).await);
        assert!(found == expected && text.contains(words), "{found:?} {text}");
        assert!(!sandbox.cgroups.join(id(1)).exists());
    }
    sandbox.end().await;
}

#[tokio::test]
async fn a_container_may_have_its_own_uts_ipc_and_network_namespaces() {
    let mut sandbox = Sandbox::start().await;
    let namespaces = json!([{ "type": "uts" }, { "type": "ipc" }, { "type": "network" }]);
    let wanted = shell(1, "hostname; cat /proc/sys/kernel/domainname; cat /sys/class/net/lo/operstate /sys/class/net/lo/flags; ls /sys/class/net; cat /proc/sys/kernel/shm_rmid_forced")
        .with("/linux/namespaces", namespaces)
        .with("/linux/sysctl", json!({ "kernel.shm_rmid_forced": "1" }))
        .with("/hostname", json!("own"))
        .with("/domainname", json!("its.domain"));
    let said = sandbox.run(wanted).await;
    assert_eq!(said.stdout, "own\nits.domain\nunknown\n0x9\nlo\n1\n", "{}", said.stderr);
    sandbox.end().await;
}

#[tokio::test]
async fn limits_of_the_process_are_set() {
    let mut sandbox = Sandbox::start().await;
    let wanted = shell(1, "ulimit -n; ulimit -Hc; umask; cat /proc/self/oom_score_adj")
        .with("/process/rlimits", json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }, { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }]))
        .with("/process/user", json!({ "uid": 0, "gid": 0, "umask": 63 }))
        .with("/process/oomScoreAdj", json!(500));
    assert_eq!(sandbox.run(wanted).await.stdout, "100\n0\n0077\n500\n");
    sandbox.end().await;
}

#[tokio::test]
async fn the_sandbox_is_configured_once_and_before_anything_else() {
    let mut sandbox = Sandbox::unconfigured().await;
    assert_eq!(code(sandbox.create(shell(1, "true")).await).0, Code::FailedPrecondition);
    let request = api::ConfigureSandboxRequest {
        hostname: "pod".into(),
        ..api::ConfigureSandboxRequest::default()
    };
    let answer = sandbox.0.configure_sandbox(request.clone()).await.unwrap().into_inner();
    assert_eq!(
        answer.kernel_release,
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim()
    );
    assert_eq!(code(sandbox.0.configure_sandbox(request).await).0, Code::FailedPrecondition);
    let pod = shell(1, "true").pid(api::PidMode::Pod, 0);
    assert_eq!(
        code(sandbox.create(pod).await).0,
        Code::FailedPrecondition,
        "no shared PID namespace was asked for"
    );
    sandbox.end().await;
}

#[tokio::test]
async fn a_caller_who_hangs_up_ends_every_container() {
    let mut sandbox = Sandbox::start().await;
    for number in 1..4 {
        sandbox.create(shell(number, "trap '' TERM HUP; sleep 1000")).await.unwrap();
        sandbox.start(number).await.unwrap();
    }
    sandbox.end().await;
}

#[tokio::test]
async fn many_at_once_do_not_mix() {
    let sandbox = Sandbox::start().await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 1..=20 {
        let mut calls = sandbox.calls.clone();
        tasks.spawn(async move {
            let said = calls.run(shell(number, &format!("echo {number}; exit {number}"))).await;
            assert_eq!((said.stdout, said.exit.code), (format!("{number}\n"), number as i32));
            calls.remove(number).await.unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    sandbox.end().await;
}
