//! One more process in a container: Exec.
//!
//! It has a cgroup of its own below the container's. When the call is dropped before the process
//! has ended, that cgroup is killed, and so every descendant, unless it is to outlive its call: then its
//! stdin ends and its output is thrown away. When the process ends by itself, what it left running
//! stays, as with every other runtime, and its output is thrown away.

use crate::{
    agent::{Agent, blocking},
    cgroup::Cgroup,
    container::{self, Container, State},
    error::{Error, Step},
    launcher::Descriptors,
    plan::{ExecPlan, Plan},
    reaper::Ended,
    streams::{self, Input, Output, Stdin},
};
use a3s_box_api::agent::v1::{self as api, exec_input, exec_output};
use a3s_box_sys::signal;
use rustix::{
    fd::{AsFd, OwnedFd},
    process::Signal,
};
use std::sync::Arc;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tonic::{Status, Streaming};

/// What the call answers.
pub type Answer = Result<api::ExecOutput, Status>;

/// Runs the exec to its end; errors go to the caller as the last answer.
pub async fn run(
    agent: Arc<Agent>,
    start: api::ExecStart,
    inputs: Streaming<api::ExecInput>,
    answers: mpsc::Sender<Answer>,
) {
    let Err(error) = exec(&agent, start, inputs, &answers).await else {
        return;
    };
    // The caller may be gone.
    drop(answers.send(Err(error.into())).await);
}

async fn exec(
    agent: &Arc<Agent>,
    start: api::ExecStart,
    inputs: Streaming<api::ExecInput>,
    answers: &mpsc::Sender<Answer>,
) -> Result<(), Error> {
    let container = agent.container(&start.container_id)?;
    if *container.state().borrow() != State::Running {
        return Err(Error::NotNow(format!("container {} is not running", container.id)));
    }
    if start.args.is_empty() {
        return Err(Error::invalid("args is empty"));
    }
    let cgroup = container.exec_cgroup();
    let result = inside(agent, &container, &cgroup, start, inputs, answers).await;
    if !matches!(result, Ok(Outcome::Ended)) {
        container::empty(agent, &cgroup).await?;
    }
    // What the process left running keeps its cgroup; it goes with the container.
    if !cgroup.populated()
        && let Err(error) = blocking(move || cgroup.remove()).await
    {
        crate::log::error(format_args!("exec: {error}"));
    }
    result.map(drop)
}

enum Outcome {
    /// The process ended and the caller was told.
    Ended,
    /// The caller is gone.
    Abandoned,
}

async fn inside(
    agent: &Arc<Agent>,
    container: &Container,
    cgroup: &Cgroup,
    start: api::ExecStart,
    inputs: Streaming<api::ExecInput>,
    answers: &mpsc::Sender<Answer>,
) -> Result<Outcome, Error> {
    let lane = match &start.lane {
        Some(order) => Some(agent.lanes.take(order).await?),
        None => None,
    };
    cgroup.create()?;
    let outlives_call = start.outlives_call;
    let stdin = if start.stdin { Stdin::Open } else { Stdin::Empty };
    let (stdio, streams) = if start.tty {
        (Default::default(), None)
    } else {
        let (stdio, streams) = streams::pipes(stdin)?;
        (stdio, Some(streams))
    };
    let mut process = container.process.clone();
    process.args = start.args;
    process.terminal = start.tty;
    process.window = None;
    let descriptors = Descriptors {
        stdio,
        seccomp: container::duplicate(container.filter.as_ref())?,
        target: Some(container.target()?),
        pid_namespace: Some(container.target()?),
        cgroup: Some(cgroup.open()?),
        ..Descriptors::default()
    };
    let plan = ExecPlan {
        cgroup_doors: container.cgroup.doors(),
        namespaces: container.namespaces,
        ids: container.ids,
        user: container.user.clone(),
        process,
    };
    let spawned = agent.spawn(&Plan::Exec(Box::new(plan)), 0, descriptors).await?;
    let streams = match (streams, spawned.terminal) {
        (Some(streams), _) => streams,
        (None, Some(master)) => streams::terminal(master)?,
        (None, None) => return Err(Error::NotNow("the process has no terminal".to_owned())),
    };
    let kills = container.cgroup.oom_kills();
    spawned.gate.open().await?;
    let pid = spawned.pid.as_raw_nonzero().get() as u32;
    if answers.send(Ok(answer(exec_output::Kind::Started(pid)))).await.is_err() {
        return Ok(Outcome::Abandoned);
    }

    let ended = watch::Sender::new(false);
    let mut outputs = JoinSet::new();
    let mut rests = Vec::new();
    let mut tasks = JoinSet::new();
    match lane {
        Some(lane) => {
            tasks.spawn(feed(inputs, streams.input.sizer()?, spawned.pidfd));
            outputs.spawn(lane.carry(streams, ended.subscribe(), answers.clone())?);
        }
        None => {
            tasks.spawn(feed(inputs, streams.input, spawned.pidfd));
            for (kind, output) in streams.outputs {
                rests.push(output.rest());
                let wrap = move |bytes| {
                    Ok(answer(match kind {
                        Output::Stdout => exec_output::Kind::Stdout(bytes),
                        Output::Stderr => exec_output::Kind::Stderr(bytes),
                    }))
                };
                outputs.spawn(output.pump(answers.clone(), wrap, ended.subscribe()));
            }
        }
    }
    let ended_how = tokio::select! {
        ended = spawned.ended => ended.map_err(std::io::Error::other).step("wait for the process")?,
        () = answers.closed(), if !outlives_call => return Ok(Outcome::Abandoned),
    };
    let Ended { code, signal, at } = ended_how;
    ended.send_replace(true);
    tasks.abort_all();
    while outputs.join_next().await.is_some() {}
    let oom_killed = signal == Signal::KILL.as_raw() as u32 && container.cgroup.oom_kills() > kills;
    let exit = api::Exit { code, signal, exited_at: at, oom_killed, ..Default::default() };
    if answers.send(Ok(answer(exec_output::Kind::Exit(exit)))).await.is_ok() && cgroup.populated() {
        for rest in rests {
            tokio::spawn(rest.discard());
        }
    }
    Ok(Outcome::Ended)
}

fn answer(kind: exec_output::Kind) -> api::ExecOutput {
    api::ExecOutput { kind: Some(kind) }
}

/// Carries the caller's input to the process.
async fn feed(mut inputs: Streaming<api::ExecInput>, mut input: Input, process: OwnedFd) {
    // An error is the call's end, which the answers notice.
    while let Ok(Some(message)) = inputs.message().await {
        match message.kind {
            Some(exec_input::Kind::Stdin(bytes)) => input.write(&bytes).await,
            Some(exec_input::Kind::CloseStdin(true)) => input.close(),
            Some(exec_input::Kind::Resize(size)) => input.resize(size.width, size.height),
            Some(exec_input::Kind::Signal(number)) => {
                let sent = signal::send(process.as_fd(), i32::try_from(number).unwrap_or(-1));
                if let Err(error) = sent {
                    crate::log::error(format_args!("exec: signal {number}: {error}"));
                }
            }
            Some(exec_input::Kind::CloseStdin(false) | exec_input::Kind::Start(_)) | None => {}
        }
    }
    input.close();
}
