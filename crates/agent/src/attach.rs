//! ContainerIo: the streams of a container's first process.

use crate::{
    container::{Container, State},
    streams::{Input, Output, Streams},
};
use a3s_box_api::agent::v1::{self as api, io_output};
use std::sync::Arc;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tonic::{Status, Streaming};

/// Carries both ways until both outputs are closed.
pub async fn run(
    container: Arc<Container>,
    streams: Streams,
    first: api::IoInput,
    inputs: Streaming<api::IoInput>,
    answers: mpsc::Sender<Result<api::IoOutput, Status>>,
) {
    // A process with this state has nothing more to say than what is in its pipes.
    let ended = watch::Sender::new(false);
    let mut outputs = JoinSet::new();
    for (kind, output) in streams.outputs {
        let wrap = move |bytes| {
            let kind = match kind {
                Output::Stdout => io_output::Kind::Stdout(bytes),
                Output::Stderr => io_output::Kind::Stderr(bytes),
            };
            Ok(api::IoOutput { kind: Some(kind) })
        };
        outputs.spawn(output.pump(answers.clone(), wrap, ended.subscribe()));
    }
    let mut feeding = JoinSet::new();
    feeding.spawn(feed(first, inputs, streams.input));
    let mut state = container.state();
    let done = async { while outputs.join_next().await.is_some() {} };
    tokio::pin!(done);
    tokio::select! {
        () = &mut done => return,
        // An error: the container is gone.
        _ = state.wait_for(|state| matches!(state, State::Exited(_))) => {}
    }
    ended.send_replace(true);
    done.await;
}

async fn feed(first: api::IoInput, mut inputs: Streaming<api::IoInput>, mut input: Input) {
    let mut next = Some(first);
    while let Some(message) = next {
        if let Some(size) = message.resize {
            input.resize(size.width, size.height);
        }
        input.write(&message.stdin).await;
        if message.close_stdin {
            input.close();
        }
        // An error is the call's end.
        next = inputs.message().await.ok().flatten();
    }
    input.close();
}
