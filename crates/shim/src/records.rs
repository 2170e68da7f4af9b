//! What the shim leaves on disk: its processes and its containers, each a whole file or none.

use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
use a3s_box_sys::pidfd::Identity;
use a3s_box_types::shim::{
    CONTAINERS_DIR, ContainerExit, ContainerPhase, ContainerRecord, PROCESSES_FILE, Process,
    Processes,
};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// The processes of the boundary so far.
pub fn save_processes(folder: &Path, processes: &Processes) -> io::Result<()> {
    write(folder, PROCESSES_FILE, &serde_json::to_vec(processes)?)
}

/// The process `pid`, which exists.
pub fn process(pid: u32) -> io::Result<Process> {
    let Identity { pid, start_time } = Identity::of(pid)?;
    Ok(Process { pid, start_time })
}

/// A container's record.
pub fn save_container(folder: &Path, record: &ContainerRecord) -> io::Result<()> {
    let folder = folder.join(CONTAINERS_DIR);
    fs::create_dir_all(&folder)?;
    write(&folder, &format!("{}.json", record.container_id), &serde_json::to_vec(record)?)
}

/// Removes a container's record; fine when there is none.
pub fn remove_container(folder: &Path, id: &str) -> io::Result<()> {
    match fs::remove_file(folder.join(CONTAINERS_DIR).join(format!("{id}.json"))) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = folder.join(format!(".{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(name))?;
    File::open(folder)?.sync_all()
}

/// The record as the server asks for it.
pub fn to_api(record: &ContainerRecord) -> shim::ContainerState {
    let phase = match record.phase {
        ContainerPhase::Created => shim::container_state::Phase::Created,
        ContainerPhase::Running => shim::container_state::Phase::Running,
        ContainerPhase::Exited => shim::container_state::Phase::Exited,
    };
    shim::ContainerState {
        container_id: record.container_id.to_string(),
        phase: phase.into(),
        created_at: record.created_at,
        started_at: record.started_at,
        exit: record.exit.map(|exit| agent::Exit {
            code: exit.code,
            signal: exit.signal,
            exited_at: exit.exited_at,
            oom_killed: exit.oom_killed,
            cause: exit.cause,
        }),
        guest_pid: record.guest_pid,
        uid: record.uid,
        gid: record.gid,
        groups: record.groups.clone(),
        end_reason: record.end_reason.clone(),
    }
}

/// An exit as the agent tells it, at this moment: a guest's clock is its own.
pub fn exit_from(exit: &agent::Exit) -> ContainerExit {
    ContainerExit {
        code: exit.code,
        signal: exit.signal,
        exited_at: now(),
        oom_killed: exit.oom_killed,
        cause: exit.cause,
    }
}

/// Now, in Unix nanoseconds.
pub fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}
