//! What the agent takes from the node when it is a process of it: namespaces that a pod shares, and
//! controllers in cgroup v1 hierarchies.
#![allow(clippy::unwrap_used)]

mod common;

use a3s_box_api::agent::v1 as api;
use a3s_box_sys::{clone3, namespace};
use common::{Sandbox, code, id, program, read_io_until, shell, within};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use serde_json::json;
use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};
use tonic::Code;

fn own_namespace(kind: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string()
}

#[tokio::test]
async fn a_pod_may_share_the_nodes_namespaces() {
    let mut sandbox = Sandbox::with(&[]).await.configured().await;
    let list = "for n in pid ipc uts net; do readlink /proc/self/ns/$n; done";
    let nodes: String =
        ["pid", "ipc", "uts", "net"].map(|kind| own_namespace(kind) + "\n").concat();
    let said = sandbox.run(shell(1, list).pid(api::PidMode::Node, 0)).await;
    assert_eq!(said.stdout, nodes, "{}", said.stderr);

    let mark = format!("/dev/shm/a3s-agent-test-{}", std::process::id());
    let script = format!("setsid sleep 3777 & echo x > {mark}; hostname; sleep 1000");
    let created = sandbox.create(shell(2, &script).pid(api::PidMode::Node, 0)).await.unwrap();
    sandbox.start(2).await.unwrap();
    let said = sandbox
        .exec(2, &["sh", "-c", &format!("{list}; cat /proc/{}/comm", std::process::id())])
        .await
        .unwrap();
    let own = fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(said.stdout, nodes + &own);
    while fs::read(&mark).is_err() {
        tokio::task::yield_now().await;
    }
    fs::remove_file(&mark).unwrap();
    let members = sandbox.cgroups.join(id(2)).join("cgroup.procs");
    assert!(fs::read_to_string(&members).unwrap().contains(&created.guest_pid.to_string()));
    sandbox.signal(2, 9, false).await.unwrap();
    sandbox.exit_of(2).await;
    assert_eq!(fs::read_to_string(&members).unwrap(), "", "what init left is killed");
    sandbox.end().await;
}

#[tokio::test]
async fn what_a_pod_shares_with_the_node_it_cannot_set() {
    let mut sandbox = Sandbox::with(&["--own", "ipc"]).await;
    let request = |name: &str| api::ConfigureSandboxRequest {
        hostname: "never-set".into(),
        sysctls: [(name.to_owned(), "1".to_owned())].into(),
        ..api::ConfigureSandboxRequest::default()
    };
    let refused = sandbox.0.configure_sandbox(request("net.ipv4.ip_forward")).await;
    let (code, text) = code(refused);
    assert_eq!(code, Code::Unimplemented);
    assert!(text.contains("net.ipv4.ip_forward"), "{text}");
    sandbox.end().await;

    let mut sandbox = Sandbox::with(&["--own", "ipc"]).await;
    sandbox.0.configure_sandbox(request("kernel.shm_rmid_forced")).await.unwrap();
    let said = sandbox.run(shell(1, "hostname; cat /proc/sys/kernel/shm_rmid_forced")).await;
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(said.stdout, hostname + "1\n");
    sandbox.end().await;
}

/// What `work` says on a thread of its own, in a copy of this mount namespace.
fn in_own_mounts<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            namespace::unshare_mount().unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

#[tokio::test]
async fn mounts_made_in_a_shared_volume_reach_the_node_and_the_nodes_reach_it() {
    let node = in_own_mounts(|| {
        for change in [MountPropagationFlags::PRIVATE, MountPropagationFlags::SHARED] {
            mount_change("/", change | MountPropagationFlags::REC).unwrap();
        }
        fs::File::open("/proc/thread-self/ns/mnt").unwrap()
    });
    let inherited = node.try_clone().unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let number = inherited.as_raw_fd().to_string();
    let mut sandbox =
        Sandbox::with(&["--own", "ipc", "--node-mounts", &number]).await.configured().await;
    let volume = sandbox.volume("both-ways");
    for folder in ["ours", "theirs"] {
        fs::create_dir(volume.join(folder)).unwrap();
    }
    let script = "mount -t tmpfs mine /v/ours; echo made; while ! grep -q ' /v/theirs ' /proc/mounts; do sleep 0.01; done; echo seen";
    let everything = json!({ "bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"] });
    let wanted = shell(1, script)
        .bind(&volume, "/v", &["rbind", "rshared"])
        .with("/process/capabilities", everything);
    sandbox.create(wanted).await.unwrap();
    let (_input, mut outputs) = sandbox.io(1).await;
    sandbox.start(1).await.unwrap();
    read_io_until(&mut outputs, "made").await;
    let (ours, theirs) = (volume.join("ours"), volume.join("theirs"));
    let mounts = in_own_mounts(|| {
        clone3::join(node.as_fd(), clone3::namespace::MOUNT).unwrap();
        mount("tmpfs", &theirs, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
    });
    assert!(mounts.contains(ours.to_str().unwrap()), "{mounts}");
    read_io_until(&mut outputs, "seen").await;
    assert_eq!(sandbox.exit_of(1).await.code, 0);
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!own.contains(ours.to_str().unwrap()), "{own}");
    drop((outputs, node, inherited));
    sandbox.end().await;
}

/// The mount points of these controllers' v1 hierarchies; `None` when one is not there.
fn hierarchies<const N: usize>(controllers: [&str; N]) -> Option<[PathBuf; N]> {
    let points = controllers.map(|name| Path::new("/sys/fs/cgroup").join(name));
    points.iter().all(|point| point.join("cgroup.procs").exists()).then_some(points)
}

#[tokio::test]
async fn limits_and_use_are_those_of_cgroup_v1_where_the_node_has_its_controllers_there() {
    const CONTROLLERS: [&str; 4] = ["cpu", "cpuacct", "memory", "pids"];
    let Some(points) = hierarchies(CONTROLLERS) else {
        return; // a node whose controllers are in cgroup v2
    };
    let name = format!("a3s-agent-test-v1-{}", std::process::id());
    let folders = points.map(|point| point.join(&name));
    for folder in &folders {
        fs::create_dir_all(folder).unwrap();
    }
    let args: Vec<String> = CONTROLLERS
        .iter()
        .zip(&folders)
        .flat_map(|(controller, folder)| {
            ["--cgroup-v1".to_owned(), format!("{controller}={}", folder.display())]
        })
        .collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut sandbox = Sandbox::with(&args).await.configured().await;

    let limits = json!({
        "memory": { "limit": 16 << 20 }, "cpu": { "shares": 300, "quota": 50000 },
        "pids": { "limit": 20 },
    });
    let wanted = program(1, &["sleep", "1000"]).with("/linux/resources", limits);
    let created = sandbox.create(wanted).await.unwrap();
    sandbox.start(1).await.unwrap();
    let file = |number: usize, file: &str| {
        fs::read_to_string(folders[number].join(id(1)).join(file)).unwrap().trim().to_owned()
    };
    assert_eq!(file(0, "cpu.shares"), "300");
    assert_eq!(file(0, "cpu.cfs_quota_us"), "50000");
    assert_eq!(file(2, "memory.limit_in_bytes"), (16 << 20).to_string());
    assert_eq!(file(3, "pids.max"), "20");
    for number in 0..4 {
        assert_eq!(file(number, "cgroup.procs"), created.guest_pid.to_string());
    }
    let count = "cat /proc/self/cgroup | grep -c ':/$'";
    let said = sandbox.exec(1, &["sh", "-c", count]).await.unwrap();
    assert!(said.stdout.trim().parse::<u32>().unwrap() > 4, "an exec enters all: {said:?}");
    let stats = within(sandbox.0.stats(api::StatsRequest::default())).await.unwrap().into_inner();
    let [stats] = &stats.containers[..] else { panic!("one container") };
    assert_eq!((stats.memory_limit_bytes, stats.processes), (16 << 20, 1));
    assert!(stats.cpu_ns > 0 && stats.memory_bytes > 0, "{stats:?}");

    let eats = program(2, &["sh", "-c", "x=$(yes | head -c 100000000)"])
        .with("/linux/resources", json!({ "memory": { "limit": 16 << 20 } }));
    let said = sandbox.run(eats).await;
    assert!(said.exit.oom_killed, "{said:?}");
    let unified = json!({ "unified": { "memory.oom.group": "1" } });
    let refused = sandbox.create(program(3, &["true"]).with("/linux/resources", unified)).await;
    assert_eq!(code(refused).0, Code::Unimplemented);
    sandbox.end().await;
    for folder in &folders {
        fs::remove_dir(folder).unwrap();
    }
}
