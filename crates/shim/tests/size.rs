//! The size of real guests: memory and processors given and taken while containers use them, and memory
//! that is missing in every way it can be.
//! Needs `make guest` and root.
#![allow(clippy::unwrap_used)]

mod common;
mod guest;

use a3s_box_api::{
    agent::v1::{self as agent, ExitCause},
    shim::v1 as shim,
};
use a3s_box_sys::cgroup::{Cgroup, Hierarchies, Limits};
use a3s_box_types::{
    ContainerId,
    shim::{Start, fd},
};
use common::{Sandbox, layer, order, spec};
use guest::{MOST_VCPUS, boundary, guest, tap, template};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::Code;

const MIB: u64 = 1 << 20;
const START_MB: u32 = 512;

async fn pod(dir: &Path, cgroup: Option<&Cgroup>) -> Sandbox {
    let template = template(dir);
    let start = Start::Clone { template: template.dir().to_owned() };
    Sandbox::start(dir, boundary(dir, start), |spawn| {
        spawn.fd(tap(), fd::TAP).fd(template.ram().unwrap(), fd::TEMPLATE_RAM);
        spawn.cgroups =
            cgroup.map(|one| one.create(&Limits::default()).unwrap().0).unwrap_or_default();
    })
    .await
}

async fn resize(sandbox: &mut Sandbox, memory_mb: u32, limit: u64) -> Result<u32, tonic::Status> {
    let limits = Some(agent::LimitPodRequest { memory_bytes: limit });
    let order = shim::ResizeRequest { memory_mb, limits, vcpus: 0 };
    Ok(sandbox.client.resize(order).await?.into_inner().memory_mb)
}

/// A container that runs `script` under a memory limit, in bytes; 0: none.
async fn start(
    sandbox: &mut Sandbox,
    number: u8,
    dir: &Path,
    script: &str,
    limit: u64,
) -> ContainerId {
    let blob = dir.join("layer.erofs");
    if !blob.exists() {
        layer(dir);
    }
    let id = ContainerId::from_random([number; 32]);
    let mut spec = spec(script, dir);
    let mem = json!({ "destination": "/mem", "type": "tmpfs", "source": "tmpfs", "options": ["size=2g"] });
    spec["mounts"].as_array_mut().unwrap().push(mem);
    if limit > 0 {
        spec["linux"]["resources"] = json!({ "memory": { "limit": limit } });
    }
    let container = order(&id, &blob, &spec);
    sandbox.create_as(container, &dir.join(format!("{number}.log"))).await;
    sandbox.run(&id).await;
    id
}

async fn said(file: PathBuf) {
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_pod_is_resized_under_load_and_loses_not_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut sandbox = pod(dir.path(), None).await;
    // Writes and reads memory all the time, and says how often all was as written.
    let load = "dd if=/dev/urandom of=/mem/a bs=1M count=20; \
                while cp /mem/a /mem/b && cmp /mem/a /mem/b; do echo x >> /data/rounds; done; exit 9";
    let load = load.replace("cp /mem/a /mem/b", "dd if=/mem/a of=/mem/b bs=1M");
    let id = start(&mut sandbox, 1, dir.path(), &load, 0).await;
    let rounds = dir.path().join("rounds");
    said(rounds.clone()).await;
    for (memory_mb, limit) in [(1024, 900), (640, 500), (START_MB, 400)] {
        let had = fs::metadata(&rounds).unwrap().len();
        let mut has = resize(&mut sandbox, memory_mb, limit * MIB).await.unwrap();
        while has != memory_mb {
            assert!(has > memory_mb, "{has} MiB are less than {memory_mb}");
            has = resize(&mut sandbox, memory_mb, limit * MIB).await.unwrap();
        }
        let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
        assert_eq!(state.memory_mb, memory_mb);
        while fs::metadata(&rounds).unwrap().len() < had + 4 {
            assert_eq!(state.containers[0].phase, 1, "the load ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert_eq!(state.containers[0].exit, None, "{}", sandbox.log());
    assert_eq!(state.containers[0].container_id, id.as_str());
    sandbox.shutdown().await;
}

/// The processors that the container sees.
async fn seen(sandbox: &mut Sandbox, id: &ContainerId) -> String {
    let seen = sandbox.exec(id, &["grep", "-c", "^processor", "/proc/cpuinfo"], 0).await.unwrap();
    String::from_utf8_lossy(&seen.stdout).trim().to_owned()
}

#[tokio::test]
async fn processors_come_and_go_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let mut sandbox = pod(dir.path(), None).await;
    let load = "while echo x >> /data/rounds; do :; done & while :; do :; done";
    let id = start(&mut sandbox, 1, dir.path(), load, 0).await;
    let rounds = dir.path().join("rounds");
    said(rounds.clone()).await;
    assert_eq!(seen(&mut sandbox, &id).await, "1");
    for vcpus in [2, MOST_VCPUS, 1, 2] {
        let order = shim::ResizeRequest { memory_mb: START_MB, limits: None, vcpus };
        sandbox.client.resize(order).await.unwrap();
        assert_eq!(seen(&mut sandbox, &id).await, vcpus.to_string());
        let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
        assert_eq!(state.vcpus, vcpus);
        let had = fs::metadata(&rounds).unwrap().len();
        while fs::metadata(&rounds).unwrap().len() < had + 4 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // What cannot be had changes nothing, and is said before anything else is done.
    let order = shim::ResizeRequest { memory_mb: 1024, limits: None, vcpus: MOST_VCPUS + 1 };
    let refused = sandbox.client.resize(order).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("processors"), "{}", refused.message());
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert_eq!((state.vcpus, state.memory_mb), (2, START_MB));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_machine_that_was_booted_has_its_further_processors_too() {
    let dir = tempfile::tempdir().unwrap();
    let start_as = Start::Boot { kernel: guest("vmlinuz"), initramfs: guest("initramfs") };
    let mut sandbox = Sandbox::start(dir.path(), boundary(dir.path(), start_as), |spawn| {
        spawn.fd(tap(), fd::TAP);
    })
    .await;
    let id = start(&mut sandbox, 1, dir.path(), "sleep 1000", 0).await;
    assert_eq!(seen(&mut sandbox, &id).await, "1");
    let order = shim::ResizeRequest { memory_mb: START_MB, limits: None, vcpus: MOST_VCPUS };
    sandbox.client.resize(order).await.unwrap();
    assert_eq!(seen(&mut sandbox, &id).await, MOST_VCPUS.to_string());
    sandbox.shutdown().await;
}

#[tokio::test]
async fn what_containers_use_is_not_taken_from_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut sandbox = pod(dir.path(), None).await;
    resize(&mut sandbox, 1024, 900 * MIB).await.unwrap();
    let hold = "dd if=/dev/zero of=/mem/a bs=1M count=600; echo > /data/held; sleep 1000";
    let id = start(&mut sandbox, 1, dir.path(), hold, 0).await;
    said(dir.path().join("held")).await;
    let refused = resize(&mut sandbox, START_MB, 400 * MIB).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("more than a limit of 400 MiB"), "{}", refused.message());
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert_eq!((state.memory_mb, state.containers[0].exit), (1024, None));
    // Without the limit to stop it, the guest keeps what it cannot spare.
    let has = resize(&mut sandbox, START_MB, 0).await.unwrap();
    assert!((START_MB..1024).contains(&has), "{has} MiB");
    assert_eq!(sandbox.exec(&id, &["ls", "/mem"], 0).await.unwrap().stdout.as_ref(), b"a\n");
    sandbox.shutdown().await;
}

#[tokio::test]
async fn which_memory_was_missing_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut sandbox = pod(dir.path(), None).await;
    let greedy = "exec dd if=/dev/zero of=/mem/a bs=1M count=700";
    // The guest has 512 MiB, and nobody forbids to use more.
    let guests = start(&mut sandbox, 1, dir.path(), greedy, 0).await;
    let exit = sandbox.exit_of(&guests).await;
    assert_eq!((exit.code, exit.oom_killed, exit.cause()), (137, true, ExitCause::KernelMemory));
    let own = start(&mut sandbox, 2, dir.path(), greedy, 32 * MIB).await;
    let exit = sandbox.exit_of(&own).await;
    assert_eq!((exit.code, exit.cause()), (137, ExitCause::ContainerLimit));
    resize(&mut sandbox, START_MB, 64 * MIB).await.unwrap();
    let pods = start(&mut sandbox, 3, dir.path(), greedy, 0).await;
    let exit = sandbox.exit_of(&pods).await;
    assert_eq!((exit.code, exit.cause()), (137, ExitCause::PodLimit));
    let fine = start(&mut sandbox, 4, dir.path(), "exit 3", 0).await;
    let exit = sandbox.exit_of(&fine).await;
    assert_eq!((exit.code, exit.oom_killed, exit.cause()), (3, false, ExitCause::Process));
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_machine_that_the_node_kills_for_memory_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let hierarchies = Hierarchies::find().unwrap();
    if hierarchies == Hierarchies::default() {
        return; // a host without cgroups: nothing to prove
    }
    let cgroup = Cgroup::new(hierarchies, "/", &format!("a3s-shim-test-{}", std::process::id()));
    let mut sandbox = pod(dir.path(), Some(&cgroup)).await;
    let hold = "dd if=/dev/zero of=/mem/a bs=1M count=200";
    let unset = cgroup.update(&Limits { memory_max: 200 * MIB, ..Limits::default() });
    assert!(unset.is_empty(), "{unset:?}");
    let id = start(&mut sandbox, 1, dir.path(), hold, 0).await;
    let exit = sandbox.exit_of(&id).await;
    assert_eq!((exit.code, exit.cause()), (137, ExitCause::BoundaryMemory));
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    for why in [&state.end_reason, &state.containers[0].end_reason] {
        assert!(why.contains("for want of memory") && why.contains("signal 9"), "{why}");
    }
    sandbox.shutdown().await;
    cgroup.remove().unwrap();
}
