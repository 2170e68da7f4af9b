//! ExecSync: one more process in a container, its output collected.

use a3s_box_api::{
    agent::v1::{self as agent, agent_client::AgentClient, exec_input, exec_output},
    shim::v1 as shim,
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

/// Bytes kept of each output; the rest is dropped, as containerd does.
const OUTPUT_MAX: usize = 16 << 20;

/// Runs it to its end or its deadline; then dropping the call kills all that it started.
pub async fn run(
    mut agent: AgentClient<Channel>,
    request: shim::ExecSyncRequest,
) -> Result<shim::ExecSyncResponse, Status> {
    let start = agent::ExecStart {
        container_id: request.container_id,
        args: request.args,
        tty: false,
        stdin: false,
        outlives_call: false,
        // Its output is collected here.
        lane: None,
    };
    let collect = async move {
        let (inputs, receiver) = mpsc::channel(1);
        let first = agent::ExecInput { kind: Some(exec_input::Kind::Start(start)) };
        inputs.try_send(first).map_err(|err| Status::internal(err.to_string()))?;
        let mut outputs = agent.exec(ReceiverStream::new(receiver)).await?.into_inner();
        let mut answer = shim::ExecSyncResponse::default();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut exit = None;
        while let Some(output) = outputs.message().await? {
            match output.kind {
                Some(exec_output::Kind::Stdout(bytes)) => keep(&mut stdout, &bytes),
                Some(exec_output::Kind::Stderr(bytes)) => keep(&mut stderr, &bytes),
                // The last answer; the call's own end comes when the agent has cleaned up.
                Some(exec_output::Kind::Exit(end)) => {
                    exit = Some(end);
                    break;
                }
                Some(exec_output::Kind::Started(_)) | None => {}
            }
        }
        drop(inputs);
        let exit = exit.ok_or_else(|| Status::internal("the agent did not tell how it ended"))?;
        answer.stdout = stdout.into();
        answer.stderr = stderr.into();
        answer.exit_code = exit.code;
        Ok(answer)
    };
    match request.timeout_ms {
        0 => collect.await,
        limit => match tokio::time::timeout(Duration::from_millis(limit), collect).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded(format!(
                "timeout {}s exceeded: context deadline exceeded",
                Duration::from_millis(limit).as_secs_f64()
            ))),
        },
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8]) {
    let room = OUTPUT_MAX - kept.len();
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
}
