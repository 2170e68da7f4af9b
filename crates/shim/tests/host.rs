//! A whole sandbox on this machine's own kernel, without a server. Needs the agent (`make guest`) and
//! root.
#![allow(clippy::unwrap_used)]

mod common;

use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
use a3s_box_sys::{
    cgroup::{Cgroup, Hierarchies, Limits},
    namespace, pidfd,
};
use a3s_box_types::{
    ContainerId,
    shim::{BoundaryConfig, CgroupName, HostConfig, fd},
};
use common::{SHIM, Sandbox, layer, request};
use std::{
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};
use tonic::Code;

const DEADLINE: Duration = Duration::from_secs(20);

/// Beside the shim under test, or where `make guest` puts it.
fn agent_program() -> PathBuf {
    let beside = Path::new(SHIM).with_file_name("a3s-box-agent");
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release/a3s-box-agent");
    if beside.exists() { beside } else { made.canonicalize().expect("`make guest` has been run") }
}

/// A network namespace that only its descriptor keeps alive.
fn netns() -> OwnedFd {
    let make = || {
        namespace::unshare_network().unwrap();
        File::open("/proc/thread-self/ns/net").unwrap().into()
    };
    std::thread::spawn(make).join().unwrap()
}

/// The pod's cgroup; a failed test leaves no process in it.
struct Group(Cgroup);

impl std::ops::Deref for Group {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.0.kill().ok();
    }
}

struct Pod {
    dir: tempfile::TempDir,
    cgroup: Group,
    sandbox: Sandbox,
}

impl Pod {
    /// With namespaces of its own, or with the node's.
    async fn start(own: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = CgroupName {
            parent: "/".to_owned(),
            name: format!("a3s-shim-test-{}-{number}", std::process::id()),
        };
        let cgroup = Cgroup::new(Hierarchies::find().unwrap(), &name.parent, &name.name);
        let (doors, _unset) = cgroup.create(&Limits::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let boundary = BoundaryConfig::Host(HostConfig {
            agent: agent_program(),
            scratch: dir.path().join("scratch"),
            cgroup: name,
            own_network: own,
            own_ipc: own,
        });
        let mut sandbox = Sandbox::unconfigured(dir.path(), boundary, |spawn| {
            spawn.cgroups = doors;
            if own {
                spawn.fd(netns(), fd::NETNS);
            }
        })
        .await;
        sandbox.configure(request()).await;
        Self { dir, cgroup: Group(cgroup), sandbox }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until only these processes are in the pod's cgroup.
    async fn only(&self, pids: &[u32]) {
        let since = Instant::now();
        loop {
            let left = self.cgroup.processes().unwrap();
            if left.iter().all(|pid| pids.contains(pid)) {
                return;
            }
            assert!(since.elapsed() < DEADLINE, "{left:?} are left; {}", self.sandbox.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends it and looks for what is left.
    async fn end(self) {
        let Self { dir, cgroup, sandbox } = self;
        sandbox.shutdown().await;
        assert!(cgroup.processes().unwrap().is_empty());
        cgroup.remove().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "mounts are left: {mounts}");
        let scratch = dir.path().join("scratch");
        assert_eq!(fs::read_dir(scratch).unwrap().count(), 0, "writable layers are left");
    }
}

fn name_of(process: u32) -> String {
    fs::read_to_string(format!("/proc/{process}/comm")).unwrap()
}

#[tokio::test]
async fn a_container_runs_on_the_nodes_kernel_with_namespaces_of_its_own() {
    let mut pod = Pod::start(true).await;
    let (dir, sandbox) = (pod.dir.path().to_owned(), &mut pod.sandbox);
    let (blob, log) = (layer(&dir), dir.join("0.log"));
    fs::write(dir.join("from-host"), "written by the host").unwrap();
    let id = ContainerId::from_random([1; 32]);
    let script = "cat /data/from-host; echo; uname -n; cat /proc/self/comm /proc/1/comm; \
                  echo oops >&2; uname -r > /data/kernel; sleep 2222 & exit 7";
    sandbox.create(&id, &blob, script, &log, &dir).await;
    sandbox.run(&id).await;
    let exit = sandbox.exit_of(&id).await;
    assert_eq!((exit.code, exit.signal), (7, 0));
    let log = fs::read_to_string(log).unwrap();
    for line in ["stdout F written by the host", "stdout F pod-1", "stdout F cat", "stdout F sh"] {
        assert!(log.contains(&format!("{line}\n")), "{line}: {log}");
    }
    assert!(log.contains("stderr F oops\n"), "{log}");
    let kernel = fs::read_to_string(dir.join("kernel")).unwrap();
    assert_eq!(kernel, fs::read_to_string("/proc/sys/kernel/osrelease").unwrap());

    let sleeper = ContainerId::from_random([2; 32]);
    sandbox.create(&sleeper, &blob, "sleep 1000", &dir.join("1.log"), &dir).await;
    sandbox.run(&sleeper).await;
    let answer = sandbox.exec(&sleeper, &["sh", "-c", "echo hi; id -u; exit 3"], 0).await.unwrap();
    assert_eq!((answer.stdout.as_ref(), answer.exit_code), (b"hi\n0\n".as_slice(), 3));
    let late = sandbox.exec(&sleeper, &["sleep", "1000"], 300).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);
    let stats = sandbox.client.stats(shim::StatsRequest::default()).await.unwrap().into_inner();
    assert!(stats.host_cpu_ns > 0 && stats.host_memory_bytes > 0, "{stats:?}");
    assert!(stats.host_processes >= 4, "shim, agent, its launcher and a container: {stats:?}");
    let request = shim::RemoveContainerRequest { container_id: id.to_string() };
    sandbox.client.remove_container(request).await.unwrap();
    pod.end().await;
}

#[tokio::test]
async fn a_container_may_see_the_nodes_processes_and_network() {
    let mut pod = Pod::start(false).await;
    let (dir, sandbox) = (pod.dir.path().to_owned(), &mut pod.sandbox);
    let (blob, log) = (layer(&dir), dir.join("0.log"));
    let own = std::process::id();
    let id = ContainerId::from_random([1; 32]);
    let script = format!("cat /proc/{own}/comm; uname -n; cat /proc/net/dev; sleep 2222 & exit 5");
    let node = agent::PidMode::Node;
    sandbox.create_with(&id, &blob, &script, &log, &dir, node).await;
    sandbox.run(&id).await;
    assert_eq!(sandbox.exit_of(&id).await.code, 5);
    let log = fs::read_to_string(log).unwrap();
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for line in [name_of(own), hostname] {
        assert!(log.contains(&format!("stdout F {line}")), "{line}: {log}");
    }
    let interfaces = fs::read_to_string("/proc/net/dev").unwrap();
    for name in interfaces.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name) {
        assert!(log.contains(&format!("{name}:")), "{name}: {log}");
    }

    let sleeper = ContainerId::from_random([2; 32]);
    let script = "sleep 1000 & sleep 1000";
    sandbox.create_with(&sleeper, &blob, script, &dir.join("1.log"), &dir, node).await;
    sandbox.run(&sleeper).await;
    let answer = sandbox.exec(&sleeper, &["cat", &format!("/proc/{own}/comm")], 0).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&answer.stdout), name_of(own));
    pod.end().await;
}

#[tokio::test]
async fn a_dead_agent_is_an_exit_of_its_containers_and_takes_them_with_it() {
    let mut pod = Pod::start(false).await;
    let (dir, sandbox) = (pod.dir.path().to_owned(), &mut pod.sandbox);
    let blob = layer(&dir);
    let id = ContainerId::from_random([1; 32]);
    let node = agent::PidMode::Node;
    sandbox.create_with(&id, &blob, "sleep 1000", &dir.join("0.log"), &dir, node).await;
    sandbox.run(&id).await;
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert_eq!(name_of(state.pid), "a3s-box-agent\n");
    pidfd::Identity::of(state.pid).unwrap().kill().unwrap();
    assert_eq!(sandbox.exit_of(&id).await.code, 137);
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert!(state.end_reason.contains("signal: 9"), "{}", state.end_reason);
    pod.only(&[pod.sandbox.child.id()]).await;
    let request = shim::RemoveContainerRequest { container_id: id.to_string() };
    pod.sandbox.client.remove_container(request).await.unwrap();
    fs::remove_dir_all(pod.path().join("scratch").join(id.as_str())).unwrap();
    pod.end().await;
}

#[tokio::test]
async fn a_dead_shim_takes_agent_and_containers_with_it() {
    let mut pod = Pod::start(false).await;
    let (dir, sandbox) = (pod.dir.path().to_owned(), &mut pod.sandbox);
    let blob = layer(&dir);
    for (number, pid_mode) in [(1, agent::PidMode::Node), (2, agent::PidMode::Container)] {
        let id = ContainerId::from_random([number; 32]);
        let script = "trap '' TERM HUP; sleep 1000 & sleep 1000";
        let log = dir.join(format!("{number}.log"));
        sandbox.create_with(&id, &blob, script, &log, &dir, pid_mode).await;
        sandbox.run(&id).await;
    }
    sandbox.child.kill().unwrap();
    sandbox.child.wait().unwrap();
    pod.only(&[]).await;
    pod.cgroup.remove().unwrap();
    assert_eq!(fs::read_dir(pod.path().join("scratch")).unwrap().count(), 0);
}
