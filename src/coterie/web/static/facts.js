// Facts that a model has read in documents: a person accepts or rejects each.

const listed = document.querySelector("#facts");
const problem = document.querySelector("#problem");

async function decide(entry, accept) {
  problem.textContent = "";
  try {
    const response = await fetch("knowledge/facts", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ids: [entry.dataset.id], accept }),
    });
    if (response.status === 401) return location.assign("login");
    if (!response.ok) throw new Error((await response.json()).error.message);
  } catch (error) {
    problem.textContent = error.message;
    return;
  }
  const next = entry.nextElementSibling ?? entry.previousElementSibling;
  entry.remove();
  (next?.querySelector("button") ?? document.querySelector("#facts-title")).focus();
}

listed.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) decide(button.closest("li"), button.value === "accept");
});
