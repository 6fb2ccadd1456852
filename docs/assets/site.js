// Each cell gets the name of its column, which site.css shows on a phone.
for (const table of document.querySelectorAll(".md-typeset table")) {
  const columns = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent)
  for (const row of table.querySelectorAll("tbody tr"))
    [...row.cells].forEach((cell, i) => { cell.dataset.column = columns[i] })
}
