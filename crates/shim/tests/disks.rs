//! Block devices of the node in a real guest. Needs `make guest`, root and a loop device.
#![allow(clippy::unwrap_used)]

mod common;
mod guest;

use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
use a3s_box_types::{
    ContainerId,
    shim::{Start, fd},
};
use common::{Sandbox, layer};
use guest::{boundary, tap, template};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const MIB: u64 = 1 << 20;

/// A block device of the node, gone when dropped.
struct Loop(PathBuf);

impl Loop {
    fn of(file: &Path) -> Self {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self(String::from_utf8(made.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(Command::new("losetup").arg("--detach").arg(&self.0).status());
    }
}

fn with_disk(number: u8, blob: &Path, device: &Path, access: &str) -> shim::CreateContainerRequest {
    let spec = json!({
        "ociVersion": "1.1.0",
        "root": { "path": "rootfs" },
        "process": { "args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"],
                     "user": { "uid": 0, "gid": 0 } },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }],
            "devices": [{ "path": "/dev/disk", "type": "b", "major": 7, "minor": 99 }],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    });
    let container = agent::CreateContainerRequest {
        container_id: ContainerId::from_random([number; 32]).to_string(),
        oci_spec: serde_json::to_vec(&spec).unwrap().into(),
        layers: vec![blob.to_str().unwrap().to_owned()],
        user: Some(agent::User::default()),
        ..Default::default()
    };
    let disk = shim::HostDisk {
        host_path: device.to_str().unwrap().to_owned(),
        container_path: "/dev/disk".to_owned(),
        access: access.to_owned(),
    };
    shim::CreateContainerRequest {
        container: Some(container),
        disks: vec![disk],
        ..Default::default()
    }
}

async fn started(sandbox: &mut Sandbox, order: shim::CreateContainerRequest) -> ContainerId {
    let id: ContainerId = order.container.as_ref().unwrap().container_id.parse().unwrap();
    if let Err(error) = sandbox.client.create_container(order).await {
        panic!("{error}; {}", sandbox.log());
    }
    sandbox.run(&id).await;
    id
}

async fn removed(sandbox: &mut Sandbox, id: &ContainerId) {
    let request = shim::RemoveContainerRequest { container_id: id.to_string() };
    sandbox.client.remove_container(request).await.unwrap();
}

#[tokio::test]
async fn a_block_device_of_the_node_is_a_disk_with_its_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("device");
    fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
    let device = Loop::of(&file);
    let template = template(dir.path());
    let start = Start::Clone { template: template.dir().to_owned() };
    let mut sandbox = Sandbox::start(dir.path(), boundary(dir.path(), start), |spawn| {
        spawn.fd(tap(), fd::TAP).fd(template.ram().unwrap(), fd::TEMPLATE_RAM);
    })
    .await;
    let blob = layer(dir.path());
    let write = ["sh", "-c", "echo written inside | dd of=/dev/disk conv=fsync"];
    let read = ["dd", "if=/dev/disk", "bs=14", "count=1"];

    let writer = started(&mut sandbox, with_disk(1, &blob, &device.0, "rwm")).await;
    let said = sandbox.exec(&writer, &write, 0).await.unwrap();
    assert_eq!(said.exit_code, 0, "{said:?}");
    assert!(fs::read(&device.0).unwrap().starts_with(b"written inside\n"));
    // A second container has the same disk, and may only read it.
    let reader = started(&mut sandbox, with_disk(2, &blob, &device.0, "r")).await;
    let said = sandbox.exec(&reader, &read, 0).await.unwrap();
    assert_eq!(said.stdout.as_ref(), b"written inside");
    let said = sandbox.exec(&reader, &write, 0).await.unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("not permitted"), "{said:?}");
    removed(&mut sandbox, &writer).await;
    removed(&mut sandbox, &reader).await;

    // Now nobody can write it, so that the guest cannot either, and a writer comes too late.
    let reader = started(&mut sandbox, with_disk(3, &blob, &device.0, "r")).await;
    let said = sandbox.exec(&reader, &read, 0).await.unwrap();
    assert_eq!(said.stdout.as_ref(), b"written inside");
    let late = with_disk(4, &blob, &device.0, "rw");
    let refused = sandbox.client.create_container(late).await.unwrap_err();
    assert!(refused.message().contains("has it read-only"), "{}", refused.message());
    let none = with_disk(5, &blob, Path::new("/dev/null"), "r");
    let refused = sandbox.client.create_container(none).await.unwrap_err();
    assert!(
        refused.message().contains("/dev/null: it is no block device"),
        "{}",
        refused.message()
    );
    removed(&mut sandbox, &reader).await;
    sandbox.shutdown().await;
}
