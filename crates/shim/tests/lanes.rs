//! Lanes of a real guest: who has them, and what one carries after a session that left it half-way.
//! Needs `make guest` and root.
#![allow(clippy::unwrap_used)]

mod common;
mod guest;

use a3s_box_api::agent::v1::{self as agent, exec_input, exec_output};
use a3s_box_lane::{
    Mark,
    frame::{Kind, Reader, Writer},
    lease::{Lane, borrow},
};
use a3s_box_sys::duplex::Duplex;
use a3s_box_types::{
    ContainerId,
    shim::{LANES_FILE, Start, fd},
};
use common::{Sandbox, layer};
use guest::{boundary, tap, template};
use std::time::Duration;
use tokio::{net::UnixStream, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const SOON: Duration = Duration::from_secs(60);

async fn lane(sandbox: &Sandbox) -> Option<Lane> {
    borrow(UnixStream::connect(sandbox.folder.join(LANES_FILE)).await.unwrap()).await.unwrap()
}

type Inputs = mpsc::Sender<agent::ExecInput>;

/// An exec whose bytes are on the lane.
async fn exec(
    sandbox: &mut Sandbox,
    id: &ContainerId,
    lane: &Lane,
    mark: Mark,
    tty: bool,
    script: &str,
) -> (Inputs, Streaming<agent::ExecOutput>) {
    let start = agent::ExecStart {
        container_id: id.to_string(),
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        outlives_call: true,
        lane: Some(agent::Lane { number: lane.number, mark: mark.to_vec().into() }),
    };
    let (inputs, receiver) = mpsc::channel(1);
    let start = agent::ExecInput { kind: Some(exec_input::Kind::Start(start)) };
    inputs.send(start).await.unwrap();
    let call = sandbox.client.exec(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    (inputs, call)
}

async fn exit_code(mut call: Streaming<agent::ExecOutput>) -> i32 {
    loop {
        match call.message().await.unwrap().unwrap().kind {
            Some(exec_output::Kind::Exit(exit)) => return exit.code,
            Some(exec_output::Kind::Started(_)) => {}
            other => panic!("{other:?} in the call of an exec with a lane"),
        }
    }
}

/// What a terminal shows, and how its process ends, when `typed` is typed at its first line.
async fn conversation(
    sandbox: &mut Sandbox,
    id: &ContainerId,
    lane: &Lane,
    mark: Mark,
    script: &str,
    typed: &[u8],
) -> (String, i32) {
    let (_inputs, call) = exec(sandbox, id, lane, mark, true, script).await;
    let stream = lane.stream.try_clone().unwrap();
    let (from, to) = tokio::io::split(Duplex::new(stream).unwrap());
    let mut writer = Writer::begin(to, &mark).await.unwrap();
    let mut reader = timeout(SOON, Reader::begin(from, &mark)).await.unwrap().unwrap();
    let (mut said, mut answered) = (Vec::new(), false);
    while let Some((Kind::Main, bytes)) = timeout(SOON, reader.next()).await.unwrap().unwrap() {
        said.extend_from_slice(bytes);
        if !answered && said.ends_with(b"\r\n") {
            answered = true;
            writer.send(Kind::Main, typed).await.unwrap();
        }
    }
    let code = timeout(SOON, exit_code(call)).await.unwrap();
    (String::from_utf8_lossy(&said).into_owned(), code)
}

#[tokio::test]
async fn a_lane_carries_one_session_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let template = template(dir);
    let start = Start::Clone { template: template.dir().to_owned() };
    let mut sandbox = Sandbox::start(dir, boundary(dir, start), |spawn| {
        spawn.fd(tap(), fd::TAP).fd(template.ram().unwrap(), fd::TEMPLATE_RAM);
    })
    .await;
    let (blob, id) = (layer(dir), ContainerId::from_random([1; 32]));
    sandbox.create(&id, &blob, "sleep 1000", &dir.join("0.log"), dir).await;
    sandbox.run(&id).await;

    // One that nobody reads any more, with frames on their way and one of them half written.
    let lent = lane(&sandbox).await.unwrap();
    assert_eq!(lent.number, 0);
    let (inputs, call) = exec(&mut sandbox, &id, &lent, [1; 16], false, "yes").await;
    let stream = lent.stream.try_clone().unwrap();
    let (from, to) = tokio::io::split(Duplex::new(stream).unwrap());
    drop(Writer::begin(to, &[1; 16]).await.unwrap());
    let mut reader = timeout(SOON, Reader::begin(from, &[1; 16])).await.unwrap().unwrap();
    let (kind, bytes) = timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((kind, &bytes[..4]), (Kind::Main, &b"y\ny\n"[..]));
    drop((inputs, call, reader, lent));

    // All of them, the first again.
    let mut lanes: Vec<Lane> = Vec::new();
    while lanes.len() < a3s_box_lane::COUNT as usize {
        match lane(&sandbox).await {
            Some(lane) => lanes.push(lane),
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    assert!(lane(&sandbox).await.is_none());
    let script = "stty -echo; echo ready; read line; echo \"got $line\"; exit 5";
    for lane in lanes.iter().rev() {
        let mark = [lane.number as u8 + 2; 16];
        let told = conversation(&mut sandbox, &id, lane, mark, script, b"a line\n").await;
        assert_eq!(told, ("ready\r\ngot a line\r\n".to_owned(), 5));
    }

    // A key that ends its process is shown.
    for round in 0..20 {
        let (mark, script) = ([round + 100; 16], "echo begun; exec sleep 1000");
        let told = conversation(&mut sandbox, &id, &lanes[0], mark, script, b"\x03").await;
        assert_eq!(told, ("begun\r\n^C".to_owned(), 130), "round {round}");
    }

    // An order of a lane that is not there ends the call, and nothing else.
    let none = Lane { number: 99, ..lanes.remove(0) };
    let (_inputs, mut call) = exec(&mut sandbox, &id, &none, [9; 16], false, "true").await;
    let refused = timeout(SOON, call.message()).await.unwrap().unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("no port named lane99"), "{}", refused.message());
    sandbox.shutdown().await;
}
