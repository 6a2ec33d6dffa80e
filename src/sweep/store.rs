//! Sweeps in files: `sweeps/<id>.json`, and their items in `sweeps/<id>.tasks.json`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use uuid::Uuid;

use super::Sweep;
use crate::eval::{Task, read_json, remove_drafts, write_json};

#[derive(Debug, Clone)]
pub(super) struct Store {
    folder: PathBuf,
}

impl Store {
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let folder = data_dir.join("sweeps");
        fs::create_dir_all(&folder)?;
        remove_drafts(&folder)?;
        Ok(Self { folder })
    }

    pub fn put(&self, sweep: &Sweep) -> io::Result<()> {
        write_json(&self.folder, &format!("{}.json", sweep.id), sweep)
    }

    pub fn get(&self, id: Uuid) -> Option<Sweep> {
        read_json(&self.folder.join(format!("{id}.json"))).filter(|sweep: &Sweep| sweep.id == id)
    }

    pub fn put_tasks(&self, id: Uuid, tasks: &[Arc<Task>]) -> io::Result<()> {
        let tasks: Vec<Value> = tasks.iter().map(|task| task.to_json()).collect();
        write_json(&self.folder, &format!("{id}.tasks.json"), &tasks)
    }

    /// None if they cannot be read.
    pub fn tasks(&self, id: Uuid) -> Option<Vec<Task>> {
        let tasks: Vec<Value> = read_json(&self.folder.join(format!("{id}.tasks.json")))?;
        tasks.into_iter().map(|task| Task::from_json(task).ok()).collect()
    }

    pub fn all(&self) -> io::Result<Vec<Sweep>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_suffix(".json")?.parse().ok());
            all.extend(id.and_then(|id| self.get(id)));
        }
        Ok(all)
    }
}
