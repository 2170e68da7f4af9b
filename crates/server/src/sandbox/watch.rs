//! Watching a shim: its State is the truth, its events tell when to look, its end is the sandbox's.

use super::Deps;
use crate::status::chain;
use a3s_box_api::shim::v1::{self as shim, event::Kind, state_response::Boundary};
use a3s_box_types::SandboxId;
use std::time::Duration;
use tokio::sync::mpsc;

/// Between two looks at a shim that does not answer.
const PAUSE: Duration = Duration::from_millis(500);
/// A boundary that ended without a word.
const SILENT_END: &str = "the shim ended without a word";

/// What the watcher tells the driver.
#[derive(Debug)]
pub enum Note {
    /// The whole truth, after each new connection.
    State(Box<shim::StateResponse>),
    /// A container ended.
    Exited(Box<shim::ContainerState>),
    /// The boundary ended, and why.
    Ended(String),
    /// The shim's process is there, or may be, and does not answer.
    Unclear(String),
}

/// Watches until the boundary ends or the driver does.
pub async fn watch(id: SandboxId, deps: Deps, notes: mpsc::Sender<Note>) {
    while let Some(note) = look(&id, &deps, &notes).await {
        let last = matches!(note, Note::Ended(_));
        if notes.send(note).await.is_err() || last {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Follows one connection to its end. `None`: the driver has gone.
async fn look(id: &SandboxId, deps: &Deps, notes: &mpsc::Sender<Note>) -> Option<Note> {
    let client = deps.shims.client(id);
    let state = match client.state().await {
        Ok(state) => state,
        Err(error) => {
            return Some(match deps.shims.is_alive(id).await {
                Ok(false) => Note::Ended(SILENT_END.to_owned()),
                Ok(true) => Note::Unclear(chain(&error)),
                Err(doubt) => Note::Unclear(format!("{}; {}", chain(&error), chain(&doubt))),
            });
        }
    };
    let ended = (state.boundary() == Boundary::Ended).then(|| state.end_reason.clone());
    notes.send(Note::State(Box::new(state))).await.ok()?;
    if let Some(why) = ended {
        return Some(Note::Ended(why));
    }
    let mut events = match client.events().await {
        Ok(events) => events,
        Err(error) => return Some(Note::Unclear(chain(&error))),
    };
    loop {
        match events.message().await {
            Ok(Some(event)) => match event.kind {
                Some(Kind::ContainerExited(state)) => {
                    notes.send(Note::Exited(Box::new(state))).await.ok()?;
                }
                Some(Kind::BoundaryEnded(why)) => return Some(Note::Ended(why)),
                None => {}
            },
            // The next look says what that means.
            Ok(None) | Err(_) => return after_a_break(id, deps).await,
        }
    }
}

/// The stream broke: the shim has ended, or will answer again.
async fn after_a_break(id: &SandboxId, deps: &Deps) -> Option<Note> {
    match deps.shims.client(id).state().await {
        Ok(state) if state.boundary() == Boundary::Ended => Some(Note::Ended(state.end_reason)),
        Ok(state) => Some(Note::State(Box::new(state))),
        Err(error) => Some(match deps.shims.is_alive(id).await {
            Ok(false) => Note::Ended(SILENT_END.to_owned()),
            Ok(true) | Err(_) => Note::Unclear(chain(&error)),
        }),
    }
}
